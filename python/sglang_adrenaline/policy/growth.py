"""What steps will read on the mean while a new request runs: lengths of outputs, how many requests decode at a time."""

from __future__ import annotations

import msgspec

WEIGHT = 0.05
PROMPT_WEIGHT = 0.02
DUTY_WEIGHT = 0.1


class OutputLengths(msgspec.Struct, frozen=True):
    """Running means over the outputs of ended requests, the newest weighing WEIGHT; start with the default."""

    mean: float = 0.0
    square: float = 0.0

    def add(self, output_len: int) -> OutputLengths:
        if not self.mean:
            return OutputLengths(output_len, output_len**2)
        return OutputLengths(
            self.mean + WEIGHT * (output_len - self.mean), self.square + WEIGHT * (output_len**2 - self.square)
        )

    def expected_tokens(self, local_tokens: int, local_prompt_tokens: int, rows: int) -> int:
        """For `DecodeView.expected_tokens`: local_tokens now, of which local_prompt_tokens are prompts, in `rows` rows.

        Outputs of one length keep a batch that began together in step: its suffixes are all short at first and half an
        output on the mean. The more lengths vary, the more a batch mixes young and old, and now is like the mean.
        What the rows have produced already is the least that outputs are now.
        """
        if not self.mean:
            return local_tokens
        alike = max(2.0 - self.square / self.mean**2, 0.0)  # 1 - the squared coefficient of variation
        mean = max(self.mean, (local_tokens - local_prompt_tokens) / rows) if rows else self.mean
        half_way = local_prompt_tokens + (rows + 1) * mean / 2
        return int(alike * half_way + (1.0 - alike) * local_tokens)


class PromptLengths(msgspec.Struct, frozen=True):
    """Running mean, the newest weighing PROMPT_WEIGHT."""

    mean: float = 0.0

    def add(self, prompt_len: int) -> PromptLengths:
        return PromptLengths(self.mean + PROMPT_WEIGHT * (prompt_len - self.mean) if self.mean else prompt_len)


class Duty(msgspec.Struct, frozen=True):
    """Running mean of the share of admitted requests that decode; the prompts of the others are being computed."""

    share: float = 1.0

    def add(self, running: int, admitted: int) -> Duty:
        if running <= 0 or admitted <= 0:
            return self
        return Duty(self.share + DUTY_WEIGHT * (min(running / admitted, 1.0) - self.share))
