"""Exceptions of this package.

AdrenalineError
  ConfigError      an option, environment value or combination that we refuse
  HookError        a touch point in SGLang is missing or was not patched
  ControlError     the control plane cannot do what was asked
  ChannelError     the data plane cannot do what was asked
    PeerLostError  the other side of a channel is gone or too late
"""


class AdrenalineError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(AdrenalineError):
    """A value the user gave cannot be served; the text is one line for the user."""


class HookError(AdrenalineError):
    """SGLang does not have a touch point we need, or our hook did not apply."""


class ControlError(AdrenalineError):
    """Malformed, unauthentic or unexpected control traffic."""


class ChannelError(AdrenalineError):
    """The data plane refused or failed."""


class PeerLostError(ChannelError):
    """The peer of a channel died, left, or missed a deadline."""
