"""What a training would take: parameters, FLOPs, memory, communication and days, without weights, data or a GPU."""
