"""A fake engine that plays scripts from threads, and small real tokenizers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runtime.requests import EngineError, EngineStatus, SamplingParameters, TokenEvent, TokenLogprobs

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "专家混合模型把每个词送到少数专家那里。",
    "Emoji 😀😃🎉 and accents: naïve café, Straße, Ωμέγα.",
    "def route(tokens): return [expert for expert in tokens]",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'developer' %}{{ raise_exception('no developer role') }}"
    "{% endif %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# One step of a script: a token, a ready event, or something to wait for.
Step = int | TokenEvent | threading.Event


def byte_level_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Byte-level BPE whose vocabulary is so small that characters are split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<|plain ü|>", "é"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=chat_template
    )


def byte_fallback_tokenizer() -> Any:
    """Pieces with a mark for spaces, single bytes for unknown characters, and a stripped first space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁dog", "s", "中", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def scripted_logprobs(token: int, count: int) -> TokenLogprobs:
    """Log-probabilities that the engine makes up: the token comes second, after the next ids."""
    ids = [token + 1, token, *range(token + 2, token + 20)][:count]
    return TokenLogprobs(-1.5, tuple((token_id, -0.5 - place) for place, token_id in enumerate(ids)))


class ScriptedEngine:
    """Plays one script per submitted request, in the order of submission, each from a thread of its own.

    A script without an end of its own ends with "stop"; ``max_tokens`` ends it with "length".
    """

    def __init__(self, scripts: Sequence[Sequence[Step]] = (), max_context: int = 64) -> None:
        self.max_context = max_context
        self._stops: dict[int, threading.Event] = {}
        self._num_before = 0
        self.reset(scripts)

    def reset(self, scripts: Sequence[Sequence[Step]] = ()) -> None:
        """Begin anew: end what runs, forget what was."""
        self.shutdown()
        self._num_before += len(self._stops)
        self.scripts = [list(script) for script in scripts]
        self.submitted: list[tuple[list[int], SamplingParameters]] = []
        self.users: list[str] = []
        self.cancelled: list[int] = []
        self.cancel_seen = threading.Event()
        self.failure: str | None = None
        self.state: dict[str, Any] = {}
        self.ready = True
        self._stops = {}

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParameters,
        on_event: Callable[[TokenEvent], None],
        user: str = "",
    ) -> int:
        if self.failure is not None:
            raise EngineError(self.failure)
        number = len(self.submitted)
        request_id = self._num_before + number
        self.submitted.append((list(prompt_token_ids), sampling))
        self.users.append(user)
        stop = self._stops[request_id] = threading.Event()
        script = self.scripts[number] if number < len(self.scripts) else []
        threading.Thread(target=self._play, args=(script, sampling, stop, on_event), daemon=True).start()
        return request_id

    def cancel(self, request_id: int) -> None:
        if request_id not in self._stops:
            return
        self.cancelled.append(request_id - self._num_before)
        self._stops[request_id].set()
        self.cancel_seen.set()

    def status(self) -> EngineStatus:
        state = {"running": 0, "waiting": 0} | self.state
        return EngineStatus(ready=self.ready and self.failure is None, failure=self.failure, **state)

    def shutdown(self) -> None:
        for stop in self._stops.values():
            stop.set()

    @staticmethod
    def _play(
        script: Sequence[Step],
        sampling: SamplingParameters,
        stop: threading.Event,
        on_event: Callable[[TokenEvent], None],
    ) -> None:
        sent = 0
        for step in script:
            if isinstance(step, threading.Event):
                while not step.wait(0.005) and not stop.is_set():
                    pass
            if stop.is_set():
                return on_event(TokenEvent(None, "cancelled"))
            if isinstance(step, TokenEvent):
                on_event(step)
                if step.finish_reason is not None:
                    return None
            elif isinstance(step, int):
                sent += 1
                ends = sent == sampling.max_tokens
                logprobs = None if sampling.logprobs is None else scripted_logprobs(step, sampling.logprobs)
                on_event(TokenEvent(step, "length" if ends else None, logprobs=logprobs))
                if ends:
                    return None
        return on_event(TokenEvent(None, "stop"))
