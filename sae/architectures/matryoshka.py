"""Matryoshka: the first latents reconstruct rows by themselves, and so do all prefixes of a list.

With widths m_1 < … < m_G = N, û_g = Σ_{j ≤ m_g} z_j W_dec,j + b, and the reconstruction error of a
row is the mean over g of ‖u − û_g‖². A row's latents are selected once, among all N. Source:
Bussmann et al. (2025), arXiv 2503.17547; here every prefix weighs 1 / G, and there is no term of b
alone.
"""

from mlsae.base.errors import InputError
from mlsae.base.settings import setting, settings
from mlsae.base.units import counted, parse_count


def parse_prefixes(text: str) -> tuple[int, ...]:
    """`4` or `256,512,1024` → whole numbers, in the order given.

    Raises:
        InputError: not such a list.
    """
    return tuple(parse_count(part) for part in text.split(","))


@settings
class MatryoshkaSettings:
    """Training settings of architectures whose latents may be nested."""

    matryoshka: tuple[int, ...] | None = setting(
        default=None,
        unset="no prefixes",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        parse=parse_prefixes,
        metavar="PREFIXES",
        doc="Prefixes of the latents that reconstruct rows by themselves, with topk or batchtopk: "
        "their number, each twice as wide as the one before, or their widths, as 256,512,1024.",
    )


def widths(matryoshka: tuple[int, ...] | None, num_latents: int) -> tuple[int, ...] | None:
    """Widths of the prefixes, the last of them N; None for no prefixes.

    Args:
        matryoshka: the setting; of one number G the widths are N / 2^(G − 1), …, N / 2, N, rounded
            down. N may be left out at the end of a list.
        num_latents: N.

    Raises:
        InputError: a width is below 1, no larger than the one before, or above N.
    """
    if matryoshka is None:
        return None
    if len(matryoshka) > 1:
        check_widths("--matryoshka", matryoshka, num_latents)
        ends_there = matryoshka[-1] == num_latents
        return matryoshka if ends_there else (*matryoshka, num_latents)
    (count,) = matryoshka
    if not 1 <= count <= num_latents.bit_length():
        raise InputError(
            f"--matryoshka {count} is a number of prefixes, each half as wide as the next, from 1 "
            f"to {num_latents.bit_length()} with {counted(num_latents, 'latent')}: give another "
            f"number, or widths, as 256,512,1024"
        )
    return tuple(num_latents >> halvings for halvings in reversed(range(count)))


def check_widths(name: str, given: tuple[int, ...], num_latents: int) -> None:
    """Refuse widths that do not rise from at least 1 to at most N.

    Args:
        name: the setting's.
        given: the widths.
        num_latents: N.

    Raises:
        InputError: with the widths.
    """
    shown = ",".join(map(str, given))
    if not all(a < b for a, b in zip((0, *given), given, strict=False)):
        raise InputError(f"{name} takes rising widths of at least 1, got {shown}")
    if given[-1] > num_latents:
        raise InputError(
            f"{name} has a prefix of {given[-1]} latents, and there are {num_latents}: lower it, "
            f"or raise --num-latents or --expansion-factor"
        )
