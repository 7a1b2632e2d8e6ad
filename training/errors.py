"""The errors of training that a user can cause or must hear of. What raises them is elsewhere."""


class ConfigError(ValueError):
    """A setting is wrong; the message says which, its value, and the way out."""


class EngineError(RuntimeError):
    """The engine did not do what it promises; nothing the user set is to blame."""


class NonFiniteError(RuntimeError):
    """The gradient is not finite: the update was not applied and the run must stop."""
