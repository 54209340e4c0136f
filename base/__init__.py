"""What every room stands on: the error base class, durable files, units, resources, devices."""
