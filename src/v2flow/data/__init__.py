"""Pictures from WebDataset shards: order, reading, building and checking."""
