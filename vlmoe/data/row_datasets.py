# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Datasets of any form (`row_formats.py`) become datasets of conversations with the same columns.

Texts are read once and kept in the cache of `datasets`. Images are neither decoded nor copied.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .images import ImageSources, image_size, with_features, with_image_column
from .row_fields import (
    COLUMNS,
    IMAGE_COLUMNS,
    NEEDED,
    WEIGHT_COLUMNS,
    AnyRow,
    StoredImage,
    require_known_columns,
)
from .row_formats import (
    INSIDE,
    MARKED,
    PICTURE_KEYS,
    Picture,
    RowFormat,
    RowReader,
    format_of,
    has_image_parts,
    two_places,
)
from .videos import with_video_column

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features
    from datasets.features.features import FeatureType

logger = logging.getLogger(__name__)

PICTURE = r'"(image|path|url|image_url|base64)"\s*:\s*[^n\s]'
"""Matches JSON that holds a picture."""
NO_PARTS = r'^\s*([^\["\s]|\[\s*[^{\s])'
"""Matches the JSON of a content that is neither a string nor a list of objects."""
ROWS_CHECKED_FOR_IMAGES = 100
TEXT_FIELDS = (
    *("content", "value", "question", "answer", "prompt", "completion", "text", "caption"),
    *("captions", "label", "labels", "document", "article", "dialogue", "summary", "highlights"),
)
"""Fields that hold a text, or a list of parts or messages."""

FAULTY: list[Any] = [[{"role": "faulty", "content": []}]]
"""The messages of a row whose error was collected, not raised."""


def as_conversations(
    rows: "Dataset", sources: ImageSources, source: str, reader: RowReader = format_of
) -> "Dataset":
    """Convert rows of any form to conversations in `messages`, with their images in `images`.

    Images become undecoded entries that `sources` allow. Conversations stay as they are. Pictures
    found inside the content go to `images`, too.

    Raises:
        ValueError: a row cannot be converted, which names it (if `sources.faults` is given, the
            error is added to it instead), or there are pictures both inside the content and in a
            column.
    """
    rows = with_features(rows, _undecoded_features(rows, json=False))
    form = _format_of(rows, source, reader)
    rows = with_video_column(rows, sources, source)
    if form is None:
        return with_image_column(rows, sources, source)
    if form.measures:
        rows = with_image_column(rows, sources, source)
    return with_image_column(_with_messages(rows, form, source, sources.faults), sources, source)


def _with_messages(
    rows: "Dataset", form: RowFormat, source: str, faults: list[str] | None
) -> "Dataset":
    """Replace the columns of a form by `messages`, and `images` if pictures are in the content."""
    from datasets import concatenate_datasets

    texts = rows.select_columns(list(form.columns))
    texts = with_features(texts, _undecoded_features(texts, json=True))
    features = texts.features
    texts = texts.add_column("image_count", _image_counts(rows))
    if form.measures:
        texts = texts.add_column("image_sizes", _image_sizes(rows))
    converted = texts.map(
        _converted,
        with_indices=True,
        fn_kwargs={"form": form, "features": features, "source": source},
        remove_columns=texts.column_names,
        features=_features(),
        desc=f"reading {form.name}",
    )
    found = [fault for fault in converted["fault"] if fault is not None]
    if faults is not None:
        faults += found
    elif found:
        raise ValueError(found[0])
    converted = converted.remove_columns("fault")
    column = _image_column(rows)
    if any(converted["pictures"]):
        if column is not None:
            raise ValueError(f"{source}: {two_places(column)}")
        converted = converted.rename_column("pictures", "images")
    else:
        converted = converted.remove_columns("pictures")
    if form is not INSIDE or "images" in converted.column_names:
        logger.warning("%s: read as %s (%s).", source, form.name, ", ".join(form.columns))
    others = rows.remove_columns(list(form.columns))
    return concatenate_datasets([others, converted], axis=1) if others.column_names else converted


def standard_dataset(
    rows: "Dataset", sources: ImageSources, name: str, reader: RowReader = format_of
) -> "Dataset":
    """Convert a dataset of any form to one with the columns of `load_rows`.

    A dataset that has them already, or that has a format or transform, comes back as it is.
    """
    from datasets import Image, List, Value, Video

    standard = {"id": Value("string"), "images": List(Image(decode=False))}
    if "videos" in rows.column_names:
        frames = List(standard["images"])
        is_frames = rows.features["videos"] == frames
        standard["videos"] = frames if is_frames else List(Video(decode=False))
    others = {each for each in rows.column_names if each not in standard}
    is_standard = "messages" in others and others <= {*COLUMNS, *WEIGHT_COLUMNS}
    is_standard = is_standard and all(
        rows.features.get(each) == standard[each] for each in standard
    )
    if is_standard or rows.format["type"] is not None:
        return rows
    return standard_columns(as_conversations(rows, sources, name, reader), name, name)


def standard_columns(rows: "Dataset", source: str, split: str) -> "Dataset":
    """Bring the rows to the columns that `load_rows` promises, in their order.

    Raises:
        ValueError: there are no rows, a column is missing or misspelled, or messages name images
            that the rows do not have.
    """
    from datasets import Image, List, Value

    if len(rows) == 0:
        raise ValueError(f"empty dataset: split {split!r} of {source} has no rows.")
    columns = rows.column_names
    require_known_columns(columns, source, also=("id",))
    if "messages" not in columns:
        raise ValueError(
            f"{source} lacks the column `messages`; it has: {', '.join(columns)}. {NEEDED}"
        )
    unread = [name for name in columns if name not in ("id", *COLUMNS, *WEIGHT_COLUMNS)]
    if unread:
        logger.warning("%s: these columns are not read: %s.", source, ", ".join(unread))
    if "images" not in rows.column_names:
        first = rows.select(range(min(ROWS_CHECKED_FOR_IMAGES, len(rows))))["messages"]
        if any(has_image_parts(messages) for messages in first):
            raise ValueError(
                f"the messages of {source} have image parts, but there is no image column "
                f"({' or '.join(IMAGE_COLUMNS)}); it has: {', '.join(rows.column_names)}."
            )
        nothing: list[list[Any]] = [[] for _ in range(len(rows))]
        rows = rows.add_column("images", nothing, feature=List(Image(decode=False)))
    given = list(rows["id"]) if "id" in rows.column_names else [None] * len(rows)
    ids = [f"{split}[{i}]" if value is None else str(value) for i, value in enumerate(given)]
    rows = rows.remove_columns("id") if "id" in rows.column_names else rows
    rows = rows.add_column("id", ids, feature=Value("string"))
    read = ("videos", "question_type", *WEIGHT_COLUMNS)
    optional = [name for name in read if name in rows.column_names]
    return rows.select_columns(["id", "messages", "images", *optional])


def _converted(
    row: AnyRow, position: int, form: RowFormat, features: "Features", source: str
) -> dict[str, Any]:
    """Convert one row of `as_conversations`."""
    decoded = {each: _decoded(row[each], features[each], each) for each in features}
    if form.measures:
        decoded["image_sizes"] = [size and tuple(size) for size in row["image_sizes"]]
    name = f"{source}, row {position}"
    try:
        messages, pictures = form.convert(decoded, row["image_count"], name)
    except ValueError as error:
        return {"messages": FAULTY, "pictures": [], "fault": str(error)}
    return {
        "messages": messages,
        "pictures": [_entry(picture) for picture in pictures],
        "fault": None,
    }


def is_faulty(given: object) -> bool:
    """Return whether a row, or an entry of `images`, replaces one whose error was collected."""
    if not isinstance(given, Mapping):
        return False
    if "messages" in given:
        return given["messages"] == FAULTY
    return given.get("bytes") is None and given.get("path") is None


def _format_of(rows: "Dataset", source: str, reader: RowReader) -> RowFormat | None:
    """Return the form of rows, or None for conversations with `images` and for unknown rows."""
    if "messages" not in rows.column_names:
        return reader(rows.column_names, source)
    feature, stored = rows.features["messages"], _stored(rows, "messages")
    if _hold_pictures(feature, stored):
        return INSIDE
    return MARKED if _image_column(rows) and _hold_markers(feature, stored) else None


def _hold_markers(feature: "FeatureType", stored: "pyarrow.Array") -> bool:
    """Return whether messages of this feature are plain texts, or JSON with image markers."""
    import pyarrow.compute
    from datasets import Json, Value

    if isinstance(feature, Json):
        texts = stored.cast(pyarrow.string())
        return bool(pyarrow.compute.any(pyarrow.compute.match_substring(texts, "<image>")).as_py())
    if isinstance(feature, Mapping):
        fields = {name: pyarrow.compute.struct_field(stored, name) for name in feature}
        return isinstance(feature.get("content"), Value) or any(
            _hold_markers(inner, fields[name]) for name, inner in feature.items()
        )
    if hasattr(feature, "feature"):
        return _hold_markers(feature.feature, pyarrow.compute.list_flatten(stored))
    return False


def _entry(picture: Picture) -> StoredImage:
    """Return a picture as a `datasets.Image` stores it."""
    if isinstance(picture, dict):
        return {"bytes": picture.get("bytes"), "path": picture.get("path")}
    return {"bytes": None, "path": picture if isinstance(picture, str) else json.dumps(picture)}


def _hold_pictures(feature: "FeatureType", stored: "pyarrow.Array", name: str = "") -> bool:
    """Return whether messages of this feature, as Arrow stores them, hold pictures.

    So do, for this purpose, texts that `datasets` would read as JSON: "3.50", or an answer that is
    a JSON object. They need the same conversion.
    """
    import pyarrow.compute
    from datasets import Json

    if isinstance(feature, Json):
        texts = stored.cast(pyarrow.string())
        found = pyarrow.compute.match_substring_regex(texts, PICTURE)
        if name in TEXT_FIELDS:
            is_part = pyarrow.compute.match_substring_regex(texts, r'"(type|role)"\s*:')
            is_list = pyarrow.compute.match_substring_regex(texts, r"^\s*\[")
            is_text = pyarrow.compute.match_substring_regex(texts, NO_PARTS)
            is_text = pyarrow.compute.or_(
                is_text, pyarrow.compute.and_(is_list, pyarrow.compute.invert(is_part))
            )
            found = pyarrow.compute.or_(found, is_text)
        return bool(pyarrow.compute.any(found).as_py())
    if isinstance(feature, Mapping):
        fields = {name: pyarrow.compute.struct_field(stored, name) for name in feature}
        return any(
            fields[name].null_count < len(stored)
            if "type" in feature and name in PICTURE_KEYS
            else _hold_pictures(inner, fields[name], name)
            for name, inner in feature.items()
        )
    if hasattr(feature, "feature"):
        return _hold_pictures(feature.feature, pyarrow.compute.list_flatten(stored))
    return False


def _stored(rows: "Dataset", column: str) -> "pyarrow.Array":
    """Return a column as Arrow stores it."""
    return rows.with_format("arrow").select_columns([column])[:][column]


def _image_column(rows: "Dataset") -> str | None:
    return next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)


def _image_counts(rows: "Dataset") -> list[int]:
    """Count the images in the image column of each row, without decoding them."""
    import pyarrow
    import pyarrow.compute
    from datasets import Json

    column = _image_column(rows)
    if column is None:
        return [0] * len(rows)
    values = _stored(rows, column)
    feature = rows.features[column]
    if isinstance(feature, Json):
        decoded = [_decoded(value, feature) for value in values.to_pylist()]
        return [len(v) if isinstance(v, list) else int(v is not None) for v in decoded]
    if hasattr(feature, "feature"):
        return pyarrow.compute.fill_null(pyarrow.compute.list_value_length(values), 0).to_pylist()
    return values.is_valid().cast(pyarrow.int64()).to_pylist()


def _image_sizes(rows: "Dataset") -> list[list[tuple[int, int] | None]]:
    """Read (width, height) of the images in `images` of each row."""
    if "images" not in rows.column_names:
        return [[] for _ in range(len(rows))]
    return [[image_size(image) for image in images] for images in rows["images"]]


def _undecoded_features(rows: "Dataset", json: bool) -> "Features":
    """Return features that decode no media and, if `json`, no untyped JSON.

    Decoding media would open whatever paths and URLs the rows name.
    """
    from datasets import Features

    return Features(_undecoded(rows.features, json))


def _undecoded(feature: "FeatureType", json: bool) -> "FeatureType":
    """Return a feature that decodes no images, other media and, if `json`, untyped JSON."""
    from datasets import Json

    if isinstance(feature, Mapping):
        return {name: _undecoded(inner, json) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature, json))
    if not hasattr(feature, "decode") or (isinstance(feature, Json) and not json):
        return feature
    return dataclasses.replace(feature, decode=False)


def _decoded(value: Any, feature: "FeatureType", name: str = "") -> Any:
    """Read the untyped JSON and the class names of a stored value.

    `datasets` stores a text that happens to be JSON, such as "3.50" or the JSON object that a model
    shall answer with, as it is. Such a value of a text field (`name`) stays a text. A class becomes
    its name.
    """
    from datasets import ClassLabel, Json

    if value is None:
        return None
    if isinstance(feature, ClassLabel):
        return feature.names[value] if 0 <= value < len(feature.names) else value
    if isinstance(feature, Json):
        try:
            read = json.loads(value)
        except ValueError:
            return value
        if isinstance(read, str) or (name not in TEXT_FIELDS and isinstance(read, list | dict)):
            return read
        return read if _are_parts(read) else value
    if isinstance(feature, Mapping):
        return {each: _decoded(value[each], inner, each) for each, inner in feature.items()}
    if hasattr(feature, "feature"):
        return [_decoded(each, feature.feature) for each in value]
    return value


def _are_parts(read: object) -> bool:
    """Return whether a value read from JSON is a list of content parts or of messages."""
    return (
        isinstance(read, list)
        and bool(read)
        and all(isinstance(each, dict) and ("type" in each or "role" in each) for each in read)
    )


def _features() -> "Features":
    """Return the columns of a converted row."""
    from datasets import Features, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    picture = {"bytes": Value("binary"), "path": Value("string")}
    return Features(
        {"messages": List(List(message)), "pictures": List(picture), "fault": Value("string")}
    )
