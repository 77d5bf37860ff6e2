"""What a language model writes so far, kept beside the run's figures and shown in its report."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightspan.callbacks.watching.detached import detached
from lightspan.core.errors import UserError
from lightspan.core.files.places import RunPath
from lightspan.training.strategies import gathered


class TextSamples(Callback):
    """Lets a byte-level model continue a prompt when training ends, and appends {"step", "text"} to samples.jsonl.

    For modules whose `backbone(input_ids=int64 [1 T])` returns `logits` [1 T 256]. Drawn with its own generator on
    the first rank, so that training continues as without it.

    Args:
        path: the file that lines are appended to.
        prompt: text to continue, not empty.
        length: bytes to write, >= 1.
        temperature: > 0; below 1 prefers likely bytes.
        context: bytes the model reads at once.
        seed: of the draw.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        path: RunPath,
        prompt: str = "def ",
        length: int = 240,
        temperature: float = 0.7,
        context: int = 256,
        seed: int = 0,
    ) -> None:
        if not prompt or length < 1 or temperature <= 0:
            raise UserError(
                f"TextSamples needs a prompt, a length of at least 1 and a temperature above 0; got prompt={prompt!r}, "
                f"length={length}, temperature={temperature}"
            )
        self.path, self.prompt, self.length = Path(path), prompt, length
        self.temperature, self.context, self.seed = temperature, context, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before other ranks return: the blocks of a sharded model are gathered by all ranks.
        with gathered(pl_module):
            text = self.write(pl_module)
        if not trainer.is_global_zero:
            return
        line = json.dumps({"step": trainer.global_step, "text": text})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write(self, module: LightningModule) -> str:
        """The prompt and its continuation; bytes that are not text become replacement characters. It ends where
        the network's logits are not finite.
        """
        generator = torch.Generator().manual_seed(self.seed)
        tokens_1T = torch.tensor([list(self.prompt.encode())], device=module.device)
        with detached(module):
            for _ in range(self.length):
                output = module.backbone(input_ids=tokens_1T[:, -self.context :])  # type: ignore[operator]
                logits_V = output.logits[0, -1, :256].float().cpu()  # a padded head has more outputs than bytes
                if not logits_V.max().isfinite():
                    break  # a network that has diverged writes nothing
                probabilities_V = ((logits_V - logits_V.max()) / self.temperature).softmax(dim=-1)
                token = torch.multinomial(probabilities_V, 1, generator=generator).to(module.device)
                tokens_1T = torch.cat([tokens_1T, token[None]], dim=1)
        return bytes(tokens_1T[0].tolist()).decode("utf-8", "replace")
