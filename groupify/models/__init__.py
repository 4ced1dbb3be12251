"""A dense model from a spec: a torchvision name, ``demo``, or ``package.module:factory``."""
