"""Public functions, one file an op: validation, choice of backend, fake, autograd, autocast."""
