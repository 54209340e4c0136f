"""SAEs in the formats of other tools: written where the format can express them, and read."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlsae.base.directories import content_of, held, require_outside_stores
from mlsae.base.errors import InputError
from mlsae.base.files import canonical_json, fsync_directory, sha256_file, write_durably
from mlsae.base.output.console import Progress
from mlsae.base.units import counted
from mlsae.base.words import SITES
from mlsae.sae.directory import CONFIG, WEIGHTS, write
from mlsae.sae.formats import (
    dictionary_learning,
    gemma_scope,
    llamascopium,
    published,
    saelens,
    sparsify,
)
from mlsae.sae.formats.common import (
    ConversionError,
    Foreign,
    Format,
    Origin,
    joined,
    read_json,
)
from mlsae.sae.location import Found, find, nothing_at
from mlsae.sae.model import SAE, load

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        saelens,
        sparsify,
        dictionary_learning,
        published,
        gemma_scope,
        llamascopium,
    )
}
"""Name of the format, as `--to` takes it → format."""

_FILES = sorted({name for form in FORMATS.values() for name in form.files})
_SKIP_POSITIONS = 1
"""First positions that analyze leaves out for an SAE that does not name those of training."""


def export_sae(
    run: str | Path, to: str, out: str | Path, *, model: str | None = None
) -> list[Path]:
    """Write an SAE in the format of another tool.

    Reconstructions are the same function of the activations. A format that is of single layers
    gets a folder for each layer, all with the same weights unless the SAE has state for each.

    Args:
        run: directory or hub id of an SAE of this package.
        to: a name in `FORMATS`.
        out: directory to be made; absent or empty.
        model: name of the transformer, for the formats that record it.

    Returns:
        The directories that were written, one for each layer or one for all.

    Raises:
        ConversionError: the format cannot express the SAE, or the SAE lacks facts that it needs.
        InputError: there is no such format, `out` is in use, or the SAE cannot be read.
    """
    if to not in FORMATS:
        raise InputError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    form, out = FORMATS[to], Path(out)
    with Progress("read the SAE", None, ""):
        sae = load(run)
    origin = _origin_of(sae.training_record, model)
    if form.folder is not None and (origin.site is None or not origin.layers):
        raise ConversionError(
            f"the SAE {run} cannot be exported to {to}: it does not say its site and layers, and "
            f"that format holds one layer; import it again with --site and --layers"
        )
    if obstacle := form.obstacle(sae, origin):
        raise ConversionError(f"the SAE {run} cannot be exported to {to}: {obstacle}")
    with _claimed(out), Progress("write the SAE", None, ""):
        return _write(sae, form, origin, out)


def _write(sae: SAE, form: Format, origin: Origin, out: Path) -> list[Path]:
    if form.folder is None or origin.site is None:
        folders: dict[Path, int | None] = {out: None}
    else:
        folders = {out / form.folder(origin.site, n): n for n in origin.layers or ()}
    first = None
    for folder, layer in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if first is None or sae.config.depends_on_layer:
            first = folder / form.weights_file
            write_durably(first, form.weights(sae, layer))
        else:
            _repeat(first, folder / form.weights_file)
        if form.config_file is not None:
            write_durably(
                folder / form.config_file,
                canonical_json(form.configuration(sae, origin, layer)) + b"\n",
            )
    return list(folders)


def import_sae(
    source: str | Path,
    out: str | Path,
    *,
    site: str | None = None,
    layers: tuple[int, ...] | None = None,
) -> SAE:
    """Read an SAE of another tool and write it as an SAE directory of this package.

    No code of the source is executed. training.json names the source and the facts that are not
    known.

    Args:
        source: a directory, or `owner/name[/folder][@revision]` on the hub.
        out: directory to be made; absent or empty.
        site: site that the SAE was trained on, where its files do not say.
        layers: layers of the SAE, where its files do not say.

    Returns:
        The SAE, loaded from `out`.

    Raises:
        ConversionError: the SAE is of an architecture unknown here, is damaged, or names
            another site or other layers than these.
        NotAnSAEError: there is no SAE.
        InputError: `out` is in use.
    """
    if site is not None and site not in SITES:
        raise InputError(f"--site must be one of {', '.join(SITES)}, got {site!r}")
    with Progress("read the SAE", None, ""):
        found, out = find(source, _FILES), Path(out)
        form = _format_of(found)
        content = read_json(found.directory / form.config_file) if form.config_file else {}
        foreign = form.read(found.directory, content)
    origin = Origin(
        site=_agreed("site", source, foreign.origin.site, site),
        layers=_agreed("layers", source, foreign.origin.layers, layers),
        model=foreign.origin.model,
    )
    with _claimed(out), Progress("write the SAE", None, ""):
        write(out, foreign.config, foreign.tensors, _record(form, found, foreign, origin, content))
        return load(out)


def format_imported(sae: SAE, out: Path) -> str:
    """Summary of an imported SAE, for people."""
    config, record = sae.config, sae.training_record
    imported = record["imported"]
    lines = [
        f"{imported['format']}: {counted(config.num_latents, 'latent')} of {config.d_in} channels, "
        f"{config.architecture.describe()}, normalize {config.normalize}"
    ]
    lines += [f"note: {change}" for change in imported["changes"]]
    unknown = [key for key in ("site", "layers") if key not in record]
    if unknown:
        lines.append(
            f"note: {' and '.join(unknown)} not known: to analyze it, import it again with "
            f"{' and '.join(f'--{key}' for key in unknown)}"
        )
    return "\n".join([*lines, f"SAE: {out}"])


def _format_of(found: Found) -> Format:
    directory = found.directory
    forms = [
        form
        for form in FORMATS.values()
        if all((directory / name).is_file() for name in form.files)
    ]
    if forms:
        return forms[0]
    if (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file():
        raise ConversionError(f"{found.source} is an SAE of mlsae already: use it as it is")
    files = (path.relative_to(directory).as_posix() for path in sorted(directory.glob("*/**/*")))
    names = [form.weights_file for form in FORMATS.values()]
    raise ConversionError(nothing_at(found.source, files, names, f"{directory}/"))


def _agreed(name: str, source: str | Path, theirs: Any, given: Any) -> Any:
    if theirs is not None and given is not None and theirs != given:
        shown = [joined(v) if isinstance(v, tuple) else v for v in (theirs, given)]
        raise ConversionError(
            f"{source} records {name} {shown[0]}, but --{name} is {shown[1]}; leave --{name} out"
        )
    return given if theirs is None else theirs


def _record(
    form: Format, found: Found, foreign: Foreign, origin: Origin, content: Mapping[str, Any]
) -> dict[str, Any]:
    """training.json of an imported SAE, with the keys that training would write where known."""
    known: dict[str, Any] = {}
    if origin.site is not None:
        known["site"] = origin.site
    if origin.layers is not None:
        known["layers"] = list(origin.layers)
    return {
        **known,
        "imported": {
            "format": form.name,
            "source": found.source,
            "sha256": {name: sha256_file(found.directory / name) for name in form.files},
            "configuration": content,
            "model": origin.model,
            "changes": list(foreign.changes),
        },
        "store_id": None,
        "plan_id": None,
        "model_fingerprint": None,
        "skip_positions": _SKIP_POSITIONS,
        # No sequence of any store is known to have been held out.
        "validation": {"fraction": 0.0, "seed": 0, "tokens_sha256": None},
        "metrics": None,
    }


def _origin_of(record: Mapping[str, Any], model: str | None) -> Origin:
    layers = record.get("layers")
    imported = record.get("imported")
    named = imported.get("model") if isinstance(imported, Mapping) else None
    return Origin(
        site=record.get("site"),
        layers=None if layers is None else tuple(layers),
        model=model or named,
    )


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold an output directory that is free.

    Raises:
        InputError: the directory holds something, lies in a store, or another run writes there.
        ResourceError: the directory cannot be written.
    """
    require_outside_stores(out, "OUT")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a directory that is absent or empty")
    with held(out):
        if content_of(out):
            raise InputError(f"{out} is in use already: give a directory that is absent or empty")
        yield


def _repeat(first: Path, path: Path) -> None:
    """Give the weights another name: no second copy of gigabytes where a link will do."""
    try:
        os.link(first, path)
    except OSError:
        shutil.copyfile(first, path)
    fsync_directory(path.parent)
