"""What Transformers itself generates, to compare with."""

from __future__ import annotations

import torch


def greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """New tokens and their float32 logits ``[new_tokens, V]`` for one prompt alone, beyond any end of sequence."""
    answer = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return answer.sequences[0, len(prompt) :].tolist(), torch.cat(answer.logits).float()
