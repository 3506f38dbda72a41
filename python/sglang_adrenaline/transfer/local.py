"""Transfer backend `local`: KV between a prefill and a decode server of one host, with nothing to install.

SGLang's Mooncake classes bring sessions, queues, bootstrap and failure handling; the engine that moves bytes is
replaced. Touches nothing of the Mooncake package, which need not be there. Device memory needs an engine of its own:
add it to `_ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sglang.srt import server_args as server_args_module
from sglang.srt.disaggregation import utils as disaggregation_utils
from sglang.srt.disaggregation.mooncake import conn as mooncake

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.transfer.process_vm import ProcessVmEngine

BACKEND = "local"
"""Value of `--disaggregation-transfer-backend`."""


class TransferEngine(Protocol):
    """What SGLang's Mooncake manager asks of `self.engine`. Called from several transfer threads."""

    def get_session_id(self) -> str: ...

    def batch_register(self, ptrs: list[int], lengths: list[int]) -> int: ...

    def batch_deregister(self, ptrs: list[int]) -> int: ...

    def batch_transfer_sync(self, session_id: str, src: list[int], dst: list[int], lengths: list[int]) -> int: ...


def _process_vm_engine(receives: bool) -> TransferEngine:
    return ProcessVmEngine(receives=receives)


_ENGINES: dict[str, Callable[[bool], TransferEngine]] = {"cpu": _process_vm_engine}
"""Engine by device type of the KV pool; the argument says whether this side receives."""


def check_device(device: str) -> None:
    """Raises ConfigError if the backend cannot move KV of this device type."""
    if device not in _ENGINES:
        raise ConfigError(
            f"transfer backend 'local' moves KV of {' or '.join(_ENGINES)} only, not of {device}; "
            "use --disaggregation-transfer-backend mooncake or nixl"
        )


class LocalKVManager(mooncake.MooncakeKVManager):
    def init_engine(self) -> None:
        device = self.server_args.device
        check_device(device)
        receives = self.disaggregation_mode == disaggregation_utils.DisaggregationMode.DECODE
        self.engine = _ENGINES[device](receives)


class LocalKVSender(mooncake.MooncakeKVSender):
    pass


class LocalKVReceiver(mooncake.MooncakeKVReceiver):
    pass


class LocalKVBootstrapServer(mooncake.MooncakeKVBootstrapServer):
    pass


def register_local_backend() -> None:
    """Make `local` a member of SGLang's `TransferBackend` and a choice of its command line. Idempotent.

    SGLang extends the choices itself but offers nothing for the enum, which it looks up by value.
    """
    enum = disaggregation_utils.TransferBackend
    if BACKEND not in enum._value2member_map_:
        member: Any = object.__new__(enum)
        member._name_, member._value_ = BACKEND.upper(), BACKEND
        member.__objclass__ = enum
        member._sort_order_ = len(enum._member_names_)
        setattr(enum, member._name_, member)
        enum._member_names_.append(member._name_)
        enum._member_map_[member._name_] = member
        enum._value2member_map_[BACKEND] = member
    if BACKEND not in server_args_module.DISAGG_TRANSFER_BACKEND_CHOICES:
        server_args_module.add_disagg_transfer_backend_choices([BACKEND])


def get_kv_class_around(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """AROUND handler of `disaggregation.utils.get_kv_class`: our classes for `local`, else what SGLang says."""
    if transfer_backend.value != BACKEND:
        return original(transfer_backend, class_type)
    kinds = disaggregation_utils.KVClassType
    classes = {
        kinds.MANAGER: LocalKVManager,
        kinds.SENDER: LocalKVSender,
        kinds.RECEIVER: LocalKVReceiver,
        kinds.BOOTSTRAP_SERVER: LocalKVBootstrapServer,
    }
    if class_type in classes:
        return classes[class_type]
    return original(disaggregation_utils.TransferBackend.MOONCAKE, class_type)
