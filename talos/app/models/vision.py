"""Image encoders of DINOv2's layout, for a frozen head of class means."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from talos.app.extras import import_package
from talos.app.models.base import ZeroShotEncoder
from talos.app.models.folders import configuration, load_model, quiet, save_json
from talos.batches import evaluation_mode
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from talos.app.tasks import ImageTask, Task

__all__ = ["VisionEncoder", "is_vision", "load_vision_folder"]

EXAMPLES = 32  # of a class, for a head
# Of 20, 30, 40, 60, 80 and 100 the cross-entropy on validation data, with heads of 32 examples of a
# class, is least at 30 for CIFAR-10, at 60 for MNIST and at 100 for scikit-learn's digits. 40 is
# within 0.05 of the first two; digits prefers a larger one.
SCALE = 40.0
_PIXELS_FILE = "preprocessor_config.json"


class VisionEncoder(ZeroShotEncoder):
    """A `Dinov2Model`: images to unit vectors; `load_encoder` makes one.

    It reads no texts, so its heads are made of examples.

    Args:
        model: a `Dinov2Model` of transformers.
        size: height and width of the images that it gets.
        mean: of the three channels, in pixels from 0 to 1.
        std: of the three channels.
        name: the source that was loaded.
    """

    talos_wraps = "model"
    inputs = ("pixel_values",)
    scale = SCALE
    model: Any

    def __init__(
        self, model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], *, name: str
    ) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.mean, self.std = (tuple(map(float, each)) for each in (mean, std))
        self.tokenizer = self.pixels
        self.name = name

    def pixels(self, image: Any) -> Tensor:
        """Return a PIL image as the model takes it, float32 [3, size, size].

        The longer side becomes `size`, and black margins make it a square.
        """
        pillow = import_package("PIL.Image")
        longest = max(image.size)
        width, height = (max(1, round(side * self.size / longest)) for side in image.size)
        smooth = pillow.Resampling.BOX if longest > self.size else pillow.Resampling.BILINEAR
        square = pillow.new("RGB", (self.size, self.size))
        place = (self.size - width) // 2, (self.size - height) // 2
        square.paste(image.convert("RGB").resize((width, height), smooth), place)
        values = np.asarray(square, np.float32) / 255  # [size, size, 3]
        mean, std = (np.array(each, np.float32) for each in (self.mean, self.std))
        return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1).copy())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the unit vectors of images.

        Args:
            pixel_values: float32 [B, 3, H, W].

        Returns:
            float32 [B, D].
        """
        vectors = self.model(pixel_values=pixel_values).pooler_output
        return nn.functional.normalize(vectors.float(), dim=-1)

    @torch.no_grad()
    def head_from(self, task: "Task | ImageTask") -> Tensor:
        """Return the means of the classes' unit vectors, again as unit vectors.

        Args:
            task: its first `EXAMPLES` training examples of each class are taken.

        Returns:
            float32 [C, D].

        Raises:
            TalosValueError: a class has no training example.
        """
        labels = [example.label for example in task.train]
        places = [_first(labels, label) for label in range(len(task.class_names))]
        if not all(places):
            raise TalosValueError(
                f"task must have training examples of each class, of which {self.name} makes its "
                f"head, got none of {task.class_names[places.index([])]}"
            )
        batches = replace(task.batches("train", self.tokenizer), chosen=[*chain(*places)])
        sums = torch.zeros(
            len(places), self.model.config.hidden_size, dtype=torch.float32, device=self.device
        )
        with evaluation_mode(self):
            for batch in batches:
                own = {key: each.to(self.device) for key, each in batch.items()}
                sums.index_add_(0, own["labels"], self(own["pixel_values"]))
        return nn.functional.normalize(sums, dim=-1)

    def takes(self, head: Tensor) -> bool:
        """Return whether these are unit vectors of the model's size."""
        return head.is_floating_point() and head.shape[1] == self.model.config.hidden_size

    def embed(self, texts: list[str]) -> Tensor:
        """Refuse texts.

        Raises:
            TalosValueError: always.
        """
        raise TalosValueError(
            f"head must be given for {self.name}, which reads no texts; make one of examples with "
            "head_from"
        )

    def save(self, folder: Path) -> None:
        """Write the model and how it takes images into a folder that transformers reads.

        There, square images that are not larger than `size` get the same pixels. No setting says
        how others are fitted; do it before, as `pixels` does.
        """
        with quiet(import_package("transformers")):
            self.model.save_pretrained(folder)
        pixels = {
            "image_processor_type": "LlavaImageProcessor",  # the nearest: it pads to a square
            "do_pad": True,
            "resample": 2,  # bilinear
            "do_center_crop": False,
            "size": {"height": self.size, "width": self.size},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        save_json(pixels, folder / _PIXELS_FILE)


def _first(labels: Sequence[int], label: int) -> list[int]:
    """Return the places of the first `EXAMPLES` examples of a class."""
    return [place for place, each in enumerate(labels) if each == label][:EXAMPLES]


def is_vision(folder: Path) -> bool:
    """Return whether the configuration of a folder is that of a DINOv2."""
    return configuration(folder).get("model_type") == "dinov2"


def load_vision_folder(folder: Path, name: str) -> VisionEncoder:
    """Load the DINOv2 of a folder; see `talos.app.models.load_encoder`."""
    found = configuration(folder, _PIXELS_FILE)
    try:
        size, other = found["size"]["height"], found["size"]["width"]
        mean, std = found["image_mean"], found["image_std"]
        if not (type(size) is int and size == other > 0 and len(mean) == len(std) == 3):
            raise ValueError
        mean, std = ([float(each) for each in values] for values in (mean, std))
    except (KeyError, TypeError, ValueError):
        raise TalosValueError(
            f"source must hold a {_PIXELS_FILE} with a square size, image_mean and image_std, got "
            f"{folder} without; take a folder that `talos export` wrote"
        ) from None
    return VisionEncoder(load_model(folder, "AutoModel"), size, mean, std, name=name).eval()
