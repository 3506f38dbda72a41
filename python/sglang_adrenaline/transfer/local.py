"""Transfer backend `local`: KV between a prefill and a decode server of one host, with nothing to install.

SGLang's Mooncake classes bring sessions, queues, bootstrap and failure handling; the engine that moves bytes is
replaced: `process_vm.py` for CPUs, `cuda_ipc.py` for GPUs. Touches nothing of the Mooncake package, which need not be
there. Another device's memory needs an engine of its own: add it to `_ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
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


@runtime_checkable
class SlotEngine(TransferEngine, Protocol):
    """An engine that takes slots as arrays: for scattered slots SGLang's list of ranges alone costs 0.1 s and more."""

    def transfer_slots(
        self,
        session_id: str,
        src_ptrs: list[int],
        dst_ptrs: list[int],
        item_lens: list[int],
        src_slots: np.ndarray,
        dst_slots: np.ndarray,
    ) -> int: ...


def _process_vm_engine(receives: bool) -> TransferEngine:
    return ProcessVmEngine(receives=receives)


def _cuda_ipc_engine(receives: bool) -> TransferEngine:
    from sglang_adrenaline.transfer.cuda_ipc import CudaIpcEngine

    return CudaIpcEngine(receives=receives)


_ENGINES: dict[str, Callable[[bool], TransferEngine]] = {"cpu": _process_vm_engine, "cuda": _cuda_ipc_engine}
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

    def send_kvcache(
        self,
        mooncake_session_id: str,
        prefill_kv_indices: np.ndarray,
        dst_kv_ptrs: list[int],
        dst_kv_indices: np.ndarray,
        executor: Any,
        dst_layer_ids: list[int] | None = None,
        dst_device_kv_indices: np.ndarray | None = None,
    ) -> int:
        """All layers of some slots, K and V. What is not plain MHA with one slot list goes SGLang's way."""
        plain = not (self.is_mla_backend or self.is_hybrid_mla_backend) and dst_device_kv_indices is None
        if not plain or not isinstance(self.engine, SlotEngine):
            return super().send_kvcache(
                mooncake_session_id,
                prefill_kv_indices,
                dst_kv_ptrs,
                dst_kv_indices,
                executor,
                dst_layer_ids,
                dst_device_kv_indices,
            )
        src_k, src_v, dst_k, dst_v, num_layers = self.get_mha_kv_ptrs_with_pp(self.kv_args.kv_data_ptrs, dst_kv_ptrs)
        return self.engine.transfer_slots(
            mooncake_session_id,
            [*src_k[:num_layers], *src_v[:num_layers]],
            [*dst_k[:num_layers], *dst_v[:num_layers]],
            self.kv_args.kv_item_lens[: 2 * num_layers],
            prefill_kv_indices,
            dst_kv_indices,
        )


class LocalKVSender(mooncake.MooncakeKVSender):
    """SGLang sends a cached prefix before the step that continues it, while an earlier step may still be writing it.

    It leaves the event of that step at the sender, which its Mooncake classes do not look at: we do, and hold back what
    was given with an event that is not over.
    """

    _early_send_wait_event: Any = None
    """Set by SGLang's scheduler before such a `send`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._held: list[tuple[Any, ...]] = []
        super().__init__(*args, **kwargs)

    def send(self, kv_indices: np.ndarray, state_indices: list | None = None, num_kv_tokens: int | None = None) -> None:
        """Called by the scheduler thread, as `poll` is. A chunk without an event comes after its step was over."""
        event, self._early_send_wait_event = self._early_send_wait_event, None
        if event is not None and not event.query():
            self._held.append((event, kv_indices, state_indices, num_kv_tokens))
            return
        self._send_held(wait=event is None)
        super().send(kv_indices, state_indices, num_kv_tokens)

    def poll(self) -> Any:
        self._send_held(wait=False)
        return super().poll()

    def _send_held(self, *, wait: bool) -> None:
        """Pass on what is held, in order, as far as it is ready. `wait`: all of it, since a later chunk follows."""
        while self._held and (wait or self._held[0][0].query()):
            event, *chunk = self._held.pop(0)
            event.synchronize()  # at once: a step that ran after the event's is over
            super().send(*chunk)


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
