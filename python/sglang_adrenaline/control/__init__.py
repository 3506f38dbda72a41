"""Control plane: typed messages between decode ranks (clients) and prefill ranks (servers) over encrypted ZMQ.

`ControlServer` and `ControlClient` each run one thread, which owns their sockets and calls their handler. Handlers must
return fast (heartbeats wait for them); what they raise is logged. Nothing of SGLang is imported here.
"""

from sglang_adrenaline.control.client import ClientHandler, ClientState, ControlClient
from sglang_adrenaline.control.server import ControlServer, ServerHandler

__all__ = ["ClientHandler", "ClientState", "ControlClient", "ControlServer", "ServerHandler"]
