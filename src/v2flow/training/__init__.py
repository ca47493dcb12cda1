"""Training: modules, data modules and callbacks for Lightning."""
