"""Structured output on machines without a GPU: SGLang's xgrammar backend with masks that a CPU can apply.

Upstream allocates the token mask in pinned memory, which needs a CUDA driver, and applies it by a Triton kernel;
xgrammar itself has a CPU kernel. Runs in the scheduler process. Registered under upstream's name by the CPU platform;
a grammar backend that comes from the registry is not wrapped for reasoning models (upstream's rule).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.constrained import xgrammar_backend as upstream
from sglang.srt.constrained.base_grammar_backend import register_grammar_backend
from sglang.srt.runtime_context import get_context
from xgrammar import allocate_token_bitmask, apply_token_bitmask_inplace

logger = logging.getLogger(__name__)


def _apply(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Set the logits [batch, vocab] of forbidden tokens to -inf, in place; vocab_mask int32 [batch, vocab / 32]."""
    if logits.dtype == torch.float32:
        apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")
    else:  # xgrammar's kernel knows float32 only
        masked = logits.float()
        apply_token_bitmask_inplace(masked, vocab_mask, backend="cpu")
        logits.copy_(masked)


class CpuXGrammarGrammar(upstream.XGrammarGrammar):
    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: Any) -> torch.Tensor:
        return allocate_token_bitmask(batch_size, vocab_size)

    def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        _apply(logits, vocab_mask)

    def copy(self) -> CpuXGrammarGrammar:
        return _on_cpu(super().copy())


class CpuXGrammarBackend(upstream.XGrammarGrammarBackend):
    @staticmethod
    def allocate_vocab_mask(vocab_size: int, batch_size: int, device: Any) -> torch.Tensor:
        return allocate_token_bitmask(batch_size, vocab_size)

    @staticmethod
    def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        _apply(logits, vocab_mask)

    def _from_context(self, *args: Any, **kwargs: Any) -> CpuXGrammarGrammar:
        return _on_cpu(super()._from_context(*args, **kwargs))


def _on_cpu(grammar: upstream.XGrammarGrammar) -> CpuXGrammarGrammar:
    """The same grammar state with our way to apply it: a class of its own, no state of its own."""
    grammar.__class__ = CpuXGrammarGrammar
    return grammar


def register_cpu_grammar() -> None:
    """Answer to `--grammar-backend xgrammar`, which is also SGLang's default."""

    def create(server_args: Any, tokenizer: Any, vocab_size: int, eos_token_ids: set[int] | None) -> Any:
        eos = list(eos_token_ids) if eos_token_ids else None
        any_whitespace = not server_args.constrained_json_disable_any_whitespace
        try:
            return CpuXGrammarBackend(tokenizer, vocab_size, model_eos_token_ids=eos, any_whitespace=any_whitespace)
        except upstream.TokenizerNotSupportedError as error:
            logger.warning("no structured output: xgrammar does not know this tokenizer (%s)", error)
            get_context().override("grammar.import_fallback", grammar_backend="none")
            return None

    register_grammar_backend("xgrammar", create)
