"""What a residual quantizer is: its shape, and one name for each choice."""

from __future__ import annotations

import dataclasses

from dina.config import InputError
from dina.quantize import fsq

CHOICES = {
    "kind": ("rvq", "fsq", "simvq"),
    "codebook": ("separate", "shared"),
    "update": ("ema", "sgd"),
    "metric": ("euclidean", "cosine"),
    "commitment": ("cumulative", "residual"),
    "gradient": ("straight_through", "rotation"),
}


@dataclasses.dataclass(frozen=True)
class RVQConfig:
    """Shape and rules of one residual quantizer.

    Attributes:
        sizes: codes per level; one entry per level, all equal if the book is shared.
        dim: dimension of the quantised vectors.
        codebook: 'separate' (a book per level) or 'shared' (one book used by all levels, its statistics pooled).
        decay: of the moving averages, per update.
        eps: Laplace smoothing of the counts.
        restart_fraction: a code is dead when its average count is below this share of the mean count of its book.
            Relative, because the literal "less than one hit" of the paper never ends when N is below K (paper §1.4).
        restart_cap: at most this share of a book (rounded up) is restarted per update.
        commitment: 'cumulative' (each partial sum is compared with the whole vector, every level sends gradient) or
            'residual' (each level is compared with its own residual, which is passed on by the straight-through
            value, as in SoundStream and DAC: same number, gradient from the first level only; with `factor_dim` the
            comparison is in each level's own space and sends gradient to all projections, as in DAC).
        gradient: what the quantised vector hands back: 'straight_through' (the gradient as it comes) or 'rotation'
            (turned and scaled as the vector was to become the quantised one, Fifty et al. 2024), over the sum of all
            levels; with `factor_dim` and 'fsq' level by level in the levels' own spaces, behind which the projections
            are trained.
        kind: where codes come from. 'rvq': a learned book. 'simvq': a book that never changes times a learned linear
            map (Zhu et al. 2024). 'fsq': a fixed grid between learned projections, see fsq.py; each level has
            projections of its own as in DAC, so that the sum has as many dimensions as the grids together.
        update: how 'rvq' learns its books. 'ema': moving averages (VQ-VAE-2). 'sgd': parameters under the codebook
            loss |sg(r) - e|^2 of each level (VQ-VAE, DAC).
        metric: what the search calls nearest. 'euclidean', or 'cosine': vectors and codes are scaled to unit length for
            the search and for nothing else (ViT-VQGAN, DAC).
        factor_dim: dimension of codes if they are smaller than vectors, 0 = they are not: each level projects its
            residual down before the search and the code up after it (DAC has 8, reference/tokenizers.md C.2).
        beam: paths kept from level to level by `encode`; 1 = the nearest code at every level. Training searches with 1.

    Raises:
        InputError: an unknown choice, or choices that do not go together.
    """

    sizes: tuple[int, ...]
    dim: int
    codebook: str = "separate"
    decay: float = 0.99
    eps: float = 1e-5
    restart_fraction: float = 0.1
    restart_cap: float = 0.03
    commitment: str = "cumulative"
    gradient: str = "straight_through"
    kind: str = "rvq"
    update: str = "ema"
    metric: str = "euclidean"
    factor_dim: int = 0
    beam: int = 1

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise InputError(f"quantizer.{field}={getattr(self, field)!r}: choose one of {', '.join(known)}")
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"quantizer.sizes={self.sizes}: one positive size per level")
        if self.codebook == "shared" and len(set(self.sizes)) > 1:
            raise InputError(f"quantizer.sizes={self.sizes}: a shared codebook needs equal sizes")
        if self.beam < 1:
            raise InputError(f"quantizer.beam={self.beam}: at least 1")
        if not 0 <= self.factor_dim <= self.dim:
            raise InputError(f"quantizer.factor_dim={self.factor_dim}: 0 (off) to quantizer.dim={self.dim}")
        self._check_combination()

    def _check_combination(self):
        """Choices that have no meaning together."""
        own = f"quantizer.kind={self.kind!r}" if self.kind != "rvq" else f"quantizer.factor_dim={self.factor_dim}"
        if (self.kind != "rvq" or self.factor_dim) and self.codebook == "shared":
            raise InputError(f"{own} learns maps for each level: set quantizer.codebook='separate'")
        if self.kind != "rvq" and self.update != "ema":
            raise InputError(f"{own} has no books to learn by {self.update!r}: leave quantizer.update='ema'")
        if self.kind != "fsq":
            if self.factor_dim and self.commitment != "residual":
                raise InputError(f"{own} gives each level a space of its own: set quantizer.commitment='residual'")
            return
        if self.factor_dim or self.metric != "euclidean":
            raise InputError("quantizer.kind='fsq' has its own projections and rounding: set factor_dim=0, metric='euclidean'")
        for size in self.sizes:
            if not fsq.values(size):
                near = " or ".join(str(other) for other in fsq.nearest_sizes(size))
                raise InputError(
                    f"quantizer.sizes: no grid of {size} points has dimensions of 2 to {fsq.MOST} values, which needs a "
                    f"product of 2, 3, 5 and 7; the nearest size is {near}"
                )
            if len(fsq.values(size)) > self.dim:
                raise InputError(f"quantizer.dim={self.dim}: the grid of {size} points has {len(fsq.values(size))} dimensions")

    @property
    def levels(self) -> int:
        """Number of levels L."""
        return len(self.sizes)

    @property
    def books(self) -> dict[str, int]:
        """Name and size of each stored book: one if shared, else one per level ("0", "1", ...)."""
        return {str(i): size for i, size in enumerate(self.sizes[:1] if self.codebook == "shared" else self.sizes)}

    @property
    def projected(self) -> bool:
        """Whether levels search in spaces of their own, between a projection in and one out."""
        return self.kind == "fsq" or self.factor_dim > 0

    @property
    def books_are_averaged(self) -> bool:
        """Whether codes follow their vectors by moving averages."""
        return self.kind == "rvq" and self.update == "ema"

    @property
    def books_are_trained(self) -> bool:
        """Whether gradient moves the codes, so that they need a codebook loss."""
        return self.kind == "simvq" or (self.kind == "rvq" and self.update == "sgd")

    def book(self, level: int) -> str:
        """Name of the stored book that `level` uses."""
        return "0" if self.codebook == "shared" else str(level)

    def width(self, book: str) -> int:
        """Dimension of the codes of a stored book."""
        return len(fsq.values(self.books[book])) if self.kind == "fsq" else self.factor_dim or self.dim
