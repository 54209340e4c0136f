"""Foundation of every room: the error base class, durable files, units, resources, devices."""
