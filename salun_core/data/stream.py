"""Images that do not fit in memory: decoded once into a temporary file, and read from it by rows.

Rows are decoded when a pass over them begins, in the order in which they are stored, so that each file of the data is
read from front to back. After that, any row is one read of a known place, whatever the order of the batches.

The file has no name. No other process can open it, and the system frees it when this process ends, even by a kill: it
holds pixels of people who asked to be forgotten.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from salun_core.data.decode import another_size, channels_of, decode_one
from salun_core.data.images import ImageSource, Normalisation, Part, drawn_batches, not_joined
from salun_core.data.table import Encoded, Payload, Table
from salun_core.errors import StoreError
from salun_core.storage.local_files import temporary_files
from salun_core.telemetry.progress import tracked

_on_disk = partial(temporary_files, "cannot keep decoded images")
_CHUNK_ROWS = 256  # rows that a thread decodes at once, and their bytes in the file
_CHUNK_BYTES = 8 << 20
_AHEAD = 2  # batches that are read while another one is in use


@dataclass(frozen=True)
class _Chunk:
    """Rows to decode."""

    rows: list[int]
    payloads: list[Payload]


class DecodedRows:
    """Decoded pixels of the rows of a table, in a temporary file without a name.

    Each row has its place in the file, which is sparse: rows that nobody needs take no space. If the process dies at
    any point, the file is gone. If a row cannot be decoded, the rows before it stay valid, and the next pass that needs
    it fails again. All rows must have the decoded size of the row `first`; `size` and `channels` are as for `decode`.
    """

    def __init__(self, table: Table, size: int | None, channels: int | None, first: int) -> None:
        self._table, self._size = table, size
        payload, name = table.payloads[first], table.name_of(first)
        self._channels = channels or channels_of(payload, name)
        self._sides: tuple[int, ...] = decode_one(payload, name, size, self._channels).shape
        height, width = self._sides[:2]
        self.shape = (self._channels, height, width)
        self._bytes = height * width * self._channels
        self._decoded = np.zeros(len(table), dtype=bool)
        with _on_disk():
            file = tempfile.TemporaryFile(prefix="salun-images-", buffering=0)  # noqa: SIM115 - closed with this object
        self._file = file.fileno()
        weakref.finalize(self, file.close)

    def decode(self, rows: np.ndarray) -> None:
        """Decode those of some rows (int64 [N], in any order) that are not in the file yet.

        Raises IntegrityError if a row changed since the data were loaded.
        """
        missing = np.unique(rows[~self._decoded[rows]])
        workers = torch.get_num_threads()  # Pillow releases the interpreter lock while it decodes
        pending: deque[Future[tuple[list[int], np.ndarray]]] = deque()
        if not len(missing):
            return
        with ThreadPoolExecutor(workers) as pool:
            try:
                for chunk in tracked(self._chunks(missing), "decoding", -(-len(missing) // self._chunk_rows)):
                    pending.append(pool.submit(self._decode_chunk, chunk))
                    if len(pending) > workers:
                        self._write(*pending.popleft().result())
                while pending:
                    self._write(*pending.popleft().result())
            finally:
                for future in pending:
                    future.cancel()

    def read(self, rows: np.ndarray) -> Tensor:
        """Return rows (int64 [B]) that were decoded before, as uint8 [B, C, H, W] in channels-last layout."""
        if not self._decoded[rows].all():  # a hole in the file would read as black pixels
            raise AssertionError("rows are read before they are decoded")
        pixels = np.empty((len(rows), self._bytes), dtype=np.uint8)
        for place in np.argsort(rows, kind="stable").tolist():  # in the order of the disk
            with _on_disk():
                found = os.preadv(self._file, [pixels[place]], int(rows[place]) * self._bytes)
            if found != self._bytes:
                raise StoreError(
                    "cannot read decoded images", f"the temporary file ends in row {rows[place]}", "run it again"
                )
        return torch.from_numpy(pixels.reshape(len(rows), *self._sides)).permute(0, 3, 1, 2)

    def parts(self, rows: np.ndarray) -> Iterator[Tensor]:
        """Yield decoded rows in pieces of bounded size, sorted."""
        count = max(1, _CHUNK_BYTES // self._bytes)
        ordered = np.sort(rows)
        return (self.read(ordered[start : start + count]) for start in range(0, len(rows), count))

    @property
    def _chunk_rows(self) -> int:
        return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // self._bytes))

    def _chunks(self, rows: np.ndarray) -> Iterator[_Chunk]:
        chunk = _Chunk([], [])
        for row, payload in zip(rows.tolist(), _read(self._table.payloads, rows.tolist()), strict=True):
            chunk.rows.append(row)
            chunk.payloads.append(payload)
            if len(chunk.rows) == self._chunk_rows:
                yield chunk
                chunk = _Chunk([], [])
        if chunk.rows:
            yield chunk

    def _decode_chunk(self, chunk: _Chunk) -> tuple[list[int], np.ndarray]:
        pixels = np.empty((len(chunk.rows), *self._sides), dtype=np.uint8)
        for place, (row, payload) in enumerate(zip(chunk.rows, chunk.payloads, strict=True)):
            self._table.check_row(row, payload)
            array = decode_one(payload, self._table.name_of(row), self._size, self._channels)
            if array.shape != self._sides:
                raise another_size(self._table.name_of(row), array.shape, self._sides)
            pixels[place] = array
        return chunk.rows, pixels

    def _write(self, rows: list[int], pixels: np.ndarray) -> None:
        """Write rows, then mark them as decoded; neighbours go in one write."""
        edges = [0, *(place for place in range(1, len(rows)) if rows[place] != rows[place - 1] + 1), len(rows)]
        for start, end in zip(edges, edges[1:], strict=False):
            data = memoryview(pixels[start:end].tobytes())
            offset = rows[start] * self._bytes
            with _on_disk():
                while data:  # a full disk may take a part and refuse the rest
                    done = os.pwrite(self._file, data, offset)
                    data, offset = data[done:], offset + done
        self._decoded[rows] = True


def decode_together(sources: Iterable[ImageSource]) -> None:
    """Decode what the next passes over some sources need in one pass, so that each file is read once.

    Images in memory need nothing.
    """
    rows: dict[DecodedRows, list[np.ndarray]] = {}
    for source in sources:
        if isinstance(source, StreamedImages):
            rows.setdefault(source.decoded, []).append(source.rows)
    for decoded, parts in rows.items():
        decoded.decode(np.concatenate(parts))


def _read(payloads: Sequence[Payload], rows: Sequence[int]) -> Iterator[Payload]:
    return payloads.read(rows) if isinstance(payloads, Encoded) else (payloads[row] for row in rows)


@dataclass(frozen=True)
class StreamedImages:
    """Labelled images of one split in a file: an `ImageSource`.

    `decoded` holds the rows of the whole table; `rows` are those of the split, int64 [N], and so are the labels.
    """

    decoded: DecodedRows
    rows: np.ndarray
    labels: Tensor
    normalisation: Normalisation | None
    augment: str
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return self.decoded.shape

    def to(self, device: torch.device | str) -> StreamedImages:
        """Return the set with its labels on a device; batches follow them."""
        return replace(self, labels=self.labels.to(device))

    def select(self, indices: Sequence[int] | Tensor) -> StreamedImages:
        """Return the rows at these indices."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        ids = [self.ids[place] for place in index.tolist()]
        return replace(self, rows=self.rows[index.cpu().numpy()], labels=self.labels[index], ids=ids)

    def relabelled(self, labels: Tensor) -> StreamedImages:
        """Return the same images with other labels, int64 [N]."""
        return replace(self, labels=labels)

    def normalised_by(self, normalisation: Normalisation | None) -> StreamedImages:
        """Return the same images with another normalisation."""
        return replace(self, normalisation=normalisation)

    def joined(self, other: ImageSource) -> StreamedImages:
        """Return this set followed by another one that streams the same data with the same normalisation."""
        if not isinstance(other, StreamedImages) or other.decoded is not self.decoded:
            raise not_joined("their pixels are not in the same file")
        if other.normalisation != self.normalisation:
            raise not_joined("they differ in normalisation")
        rows, labels = np.concatenate([self.rows, other.rows]), torch.cat([self.labels, other.labels])
        return replace(self, rows=rows, labels=labels, ids=[*self.ids, *other.ids])

    def measured(self) -> Normalisation:
        """Compute the normalisation of these images."""
        self.ready()
        return Normalisation.counted(self.decoded.parts(self.rows))

    def ready(self) -> None:
        """Decode all of these images that were not needed before."""
        self.decoded.decode(self.rows)

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return uint8 images [N, C, H, W] by index, on the labels' device."""
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()]
        self.decoded.decode(rows)
        return self.decoded.read(rows).to(self.labels.device)

    def batches(
        self, size: int, generator: torch.Generator | None = None, augment: bool = False, part: Part | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (normalised float32 images, labels); see `ImageSource.batches`."""
        return drawn_batches(self, self._read_ahead, size, generator, augment, part)

    def _read_ahead(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Decode what the pass needs, then yield the images of each batch; the next ones are read while it is in use.

        Of several processes, each decodes its own parts only.
        """
        self.decoded.decode(self.rows[torch.cat(list(parts)).cpu().numpy()])
        pending: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for index in parts:
                pending.append(pool.submit(self.decoded.read, self.rows[index.cpu().numpy()]))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result().to(self.labels.device)
            while pending:
                yield pending.popleft().result().to(self.labels.device)
