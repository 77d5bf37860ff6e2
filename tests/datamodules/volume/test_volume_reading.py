"""NIfTI files and DICOM series as arrays in one orientation and spacing."""

import gzip
import itertools
import locale
import os
import resource
import struct
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from volume_files import dicom, element, nibabel, noise, write_nifti, write_series

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import BYTES, SECONDS
from lightspan.datamodules.volume.elements import MOST_NESTED, StoredPixels
from lightspan.datamodules.volume.intensity import IntensityWindow, Percentiles, ZScore, finite
from lightspan.datamodules.volume.packed import VolumeDecoder
from lightspan.datamodules.volume.reading import VolumeFile, VoxelGrid
from lightspan.datamodules.volume.resampling import nearest, resampled, respaced
from lightspan.datamodules.volume.subjects import Unreadable, find_subjects, reading


def test_all_48_orientations_of_a_file_are_one_volume(tmp_path: Path) -> None:
    values, affine = np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([1.0, 2, 3, 1])
    affine[:3, 3] = 5, 6, 7
    image = nibabel.Nifti1Image(values, affine)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turned = image.as_reoriented(np.array([*zip(order, signs, strict=True)], float))
            nibabel.save(turned, tmp_path / "a.nii")
            read, grid = VolumeFile("a.nii").read(tmp_path)
            assert np.array_equal(read, values.transpose(2, 1, 0))
            assert np.allclose(grid.affine, affine[:, [2, 1, 0, 3]])
            assert np.allclose(grid.spacing, (3, 2, 1))


def test_a_tilted_scan_keeps_its_tilt(tmp_path: Path) -> None:
    cos, sin = np.cos(0.3), np.sin(0.3)
    affine = np.array([[-cos, sin, 0, 0], [sin, cos, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.arange(8.0).reshape(2, 2, 2), affine), tmp_path / "a.nii")
    read, grid = VolumeFile("a.nii").read(tmp_path)
    for at in np.ndindex(2, 2, 2):  # each voxel is where it was
        place = affine @ [*at, 1]
        voxel = np.linalg.solve(grid.affine, place)[:3].round().astype(int)
        assert read[tuple(voxel)] == np.ravel_multi_index(at, (2, 2, 2))


def test_scale_unit_second_version_and_a_picture_are_read(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.array([[[2]], [[4]]], np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -1)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    read, grid = VolumeFile("a.nii").read(tmp_path)
    assert read.tolist() == [[[0.0, 1.0]]]
    assert grid.spacing.tolist() == [1000] * 3
    first, second = nibabel.Nifti1Image, nibabel.Nifti2Image
    for kind, shape, turned in (
        (second, (2, 3, 4), (4, 3, 2)),
        (first, (2, 3), (1, 3, 2)),
        (first, (2, 3, 4, 1), (4, 3, 2)),
    ):
        nibabel.save(kind(np.ones(shape, np.float64), np.eye(4)), tmp_path / "b.nii.gz")
        assert VolumeFile("b.nii.gz").read(tmp_path)[0].shape == turned


def test_a_series_is_ordered_by_the_places_of_its_slices(tmp_path: Path) -> None:
    values = noise(0, (4, 3, 2))
    write_series(tmp_path / "ct", values)
    (subject,) = find_subjects(tmp_path).subjects
    assert subject.name == "ct"
    read, grid = subject.files[0].read(tmp_path)
    assert np.array_equal(read, values[:, ::-1, ::-1])  # DICOM counts towards left and back
    assert np.allclose(grid.spacing, (3, 2, 1))
    write_series(tmp_path / "one", values[:1])
    assert VolumeFile("one", ("099.dcm",)).read(tmp_path)[0].shape == (1, 3, 2)


def test_reading_a_series_leaves_the_encoding_of_texts_as_it_is(tmp_path: Path) -> None:
    before = locale.getencoding()
    write_series(tmp_path / "ct", noise(0, (2, 3, 2)))
    find_subjects(tmp_path).subjects[0].files[0].read(tmp_path)
    assert locale.getencoding() == before


def spoilt(change: Callable[[bytearray], None]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        content = bytearray(write_nifti(folder / "x.nii", noise(0)).read_bytes())
        change(content)
        (folder / "x.nii").write_bytes(content)

    return make


def claim_much(content: bytearray) -> None:
    content[40:56] = np.array([3, 10000, 10000, 10000, 1, 1, 1, 1], "<i2").tobytes()


def truncated(folder: Path) -> None:
    path = write_nifti(folder / "x.nii.gz", noise(0))
    path.write_bytes(path.read_bytes()[:-40])


def huge_in_a_few_bytes(folder: Path) -> None:
    spoilt(claim_much)(folder)
    (folder / "y.nii.gz").write_bytes(gzip.compress((folder / "x.nii").read_bytes()))
    (folder / "x.nii").unlink()


def no_orientation(content: bytearray) -> None:
    content[252:256] = np.array([0, 1], "<i2").tobytes()  # of the sform alone
    content[280:328] = bytes(48)


def no_rotation(content: bytearray) -> None:
    content[252:268] = np.array([1, 0], "<i2").tobytes() + np.array([9, 9, 9], "<f4").tobytes()


def only_quaternion(handedness: float) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[252:268] = np.array([1, 0], "<i2").tobytes() + np.array([0, 0, 0], "<f4").tobytes()
        content[76:80] = np.float32(handedness).tobytes()

    return change


def much_more_than_it_says(folder: Path) -> None:
    whole = write_nifti(folder / "x.nii", noise(0)).read_bytes() + bytes(2**21)
    (folder / "x.nii.gz").write_bytes(gzip.compress(whole))
    (folder / "x.nii").unlink()


def written(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "x.dcm").write_bytes(content)


def nested(levels: int, open_ended: bool) -> bytes:
    if open_ended:
        begin, end = struct.pack("<HH2sHI", 9, 0x1010, b"SQ", 0, 2**32 - 1), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        item, item_end = (
            struct.pack("<HHI", 0xFFFE, number, length) for number, length in ((0xE000, 2**32 - 1), (0xE00D, 0))
        )
        return (begin + item) * levels + (item_end + end) * levels
    made = b""
    for _ in range(levels):
        made = element(9, 0x1010, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(made)) + made)
    return made


def fragmented(parts: list[bytes], more: int = 0) -> bytes:
    """A slice in run lengths. more: bytes that its last fragment says it has beyond its own."""
    lengths = [len(part) for part in parts]
    lengths[-1] += more
    packed = [struct.pack("<HHI", 0xFFFE, 0xE000, said) + part for said, part in zip(lengths, parts, strict=True)]
    start = dicom(4, 4, b"", syntax=b"1.2.840.10008.1.2.5")[: -len(element(0x7FE0, 0x10, b"OW", b""))]
    opened, closed = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 2**32 - 1), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return start + opened + b"".join(packed) + closed


def two_series(folder: Path) -> None:
    write_series(folder / "ct", noise(0, (3, 2, 2)), "1.2.3")
    (folder / "ct" / "099.dcm").rename(folder / "ct" / "a.dcm")
    write_series(folder / "ct", noise(1, (1, 2, 2)), "1.2.4")


BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: write_nifti(folder / "x.nii", noise(0)).write_bytes(b""), "x.nii: it is empty"),
    (lambda folder: write_nifti(folder / "x.nii", noise(0)).write_bytes(b"x" * 999), "x.nii: it is not a NIfTI"),
    (truncated, "x.nii.gz: it is cut short"),
    (spoilt(lambda content: content.__delitem__(slice(400, None))), "x.nii: it is cut short"),
    (spoilt(claim_much), "x.nii: it has 1,000,000,000,000 numbers, and the limit is .*LIGHTSPAN_MAX_NUMBERS"),
    (huge_in_a_few_bytes, "y.nii.gz: it has 1,000,000,000,000 numbers"),
    (spoilt(no_orientation), "x.nii: its header does not tell where its axes point"),
    (
        lambda folder: nibabel.save(
            nibabel.Nifti2Image(np.ones((2, 2, 2)), np.diag([1e300, 1e300, 1e300, 1])), folder / "x.nii"
        ),
        "x.nii: its header does not tell where its axes point",
    ),
    (spoilt(no_rotation), "x.nii: its NIfTI header is damaged: .* positive"),
    (spoilt(only_quaternion(3)), "x.nii: its NIfTI header is damaged: qfac"),
    (spoilt(lambda content: content.__setitem__(slice(344, 348), b"ni1\0")), "x.nii: its voxels are not in this file"),
    (
        lambda folder: nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2, 3)), np.eye(4)), folder / "x.nii"),
        "x.nii: it has 4 axes, 2 x 2 x 2 x 3",
    ),
    (
        lambda folder: nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.complex64), np.eye(4)), folder / "x.nii"),
        "x.nii: its voxels are complex numbers",
    ),
    (lambda folder: write_series(folder / "ct", np.ones((2, 4, 4, 3), np.uint8)), "ct: .*3 colours a voxel"),
    (much_more_than_it_says, "x.nii.gz: it unpacks to more than"),
    (written(dicom(64, 64, bytes(200))), r"x\.dcm: it is cut short: it has 200 bytes of 8,192"),
    (
        written(dicom(64, 64, bytes(8192))[:-5000]),
        r"x\.dcm: it is cut short: .* 3,192 bytes of 8,192",
    ),
    (written(fragmented([b""], more=2**31)), r"x\.dcm: it is cut short: .* of 2,147,483,648"),
    (written(dicom(4, 4, bytes(32), more=nested(MOST_NESTED + 1, True))), r"x\.dcm: its sequences are nested"),
    (written(dicom(4, 4, bytes(32), more=nested(MOST_NESTED + 1, False))), r"x\.dcm: its sequences are nested"),
    (two_series, "ct: it holds slices of 2 series"),
    (lambda folder: write_series(folder / "ct", noise(0, (5, 2, 2)), skip=2), "ct: its slices are 3 to 6 mm apart"),
    (lambda folder: (write_series(folder / "ct", noise(0, (2, 2, 2))) / "099.dcm").write_bytes(b"DICM"), "ct: 099.dcm"),
]


def test_what_cannot_be_read_is_said_with_its_name(tmp_path: Path) -> None:
    for number, (make, said) in enumerate(BAD):
        (folder := tmp_path / str(number)).mkdir()
        make(folder)
        (subject,) = find_subjects(folder).subjects
        with warnings.catch_warnings(action="error"), pytest.raises(Unreadable, match=said):
            reading(subject.files[0], subject.files[0].read, folder)


def deflated(content: bytes) -> bytes:
    """The same file in DICOM's deflated syntax."""
    plain = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1")
    at = content.index(plain) + len(plain)
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1.99")
    start = content[:132] + element(2, 0, b"UL", struct.pack("<I", len(head))) + head
    return start + packed.compress(content[at:]) + packed.flush()


def test_every_syntax_of_dicom_is_read_and_keeps_its_pixels_to_the_end(tmp_path: Path) -> None:
    pixels, file = np.arange(16, dtype="<u2"), VolumeFile(".", ("x.dcm",))
    plain = dicom(4, 4, pixels.tobytes(), more=nested(9, True) + nested(9, False))
    for content in (plain, deflated(plain)):
        written(content)(tmp_path)
        assert sorted(file.read(tmp_path)[0].ravel().tolist()) == pixels.tolist()
    icon = element(0x88, 0x200, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, 14) + element(0x7FE0, 0x10, b"OW", b"ab"))
    assert StoredPixels.of(icon + element(0x7FE0, 0x10, b"OW", bytes(32))).count == 32


def test_a_deflated_slice_takes_no_more_memory_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = deflated(dicom(4, 4, bytes(32), more=element(9, 0x1010, b"OB", bytes(2**25))))
    assert len(bomb) < 2**16
    written(bomb)(tmp_path)
    monkeypatch.setenv(BYTES.setting, str(2**20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        VolumeFile(".", ("x.dcm",)).grid(tmp_path)


def test_a_file_that_crashes_its_decoder_is_damaged_and_the_next_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "crash").mkdir()
    # No table of places; then one fragment, which says that it has no segment.
    written(fragmented([b"", bytes(64)]))(tmp_path / "crash")
    written(dicom(4, 4, np.arange(16, dtype="<u2").tobytes()))(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x\.dcm: it .* damaged"):
            VolumeFile("crash", ("x.dcm",)).read(tmp_path)
        assert VolumeFile(".", ("x.dcm",)).read(tmp_path)[0].sum() == 120


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def bytes_of_children() -> int:
    """Resident, of the processes that this one started and that still run."""
    pages = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(FileNotFoundError):
            pages += int(Path(f"/proc/{child}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_what_a_decoder_keeps_of_damaged_files_ends_with_its_process(tmp_path: Path) -> None:
    head = element(2, 0x10, b"UI", b"1.2.840.10008.1.2") + struct.pack("<HH2sH", 2, 0x12, b"U ", 0)
    start = bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(head))) + head
    # After a kind that there is none of, the decoder takes the next bytes for an element, of 320 MiB, which it keeps.
    written(start + struct.pack("<4sI", b"1.2.", 320 * 2**20) + bytes(9000))(tmp_path)
    before = bytes_of_children()  # of what other tests of this process started
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x\.dcm: it is not a DICOM image"):
            VolumeFile(".", ("x.dcm",)).read(tmp_path)
        assert bytes_of_children() - before < 2**28


def test_packed_files_one_after_the_other_are_one_volume(tmp_path: Path) -> None:
    """As pigz, bgzip and cat write them."""
    content = write_nifti(tmp_path / "x.nii", noise(0)).read_bytes()
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    assert np.array_equal(VolumeFile("y.nii.gz").read(tmp_path)[0], noise(0))


def test_without_the_extra_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "x.nii", noise(0))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"nibabel.*\[volumes\]"):
        VolumeFile("x.nii").read(tmp_path)


def test_resampling_keeps_places_means_and_labels() -> None:
    grid = VoxelGrid((20, 9, 4), np.diag([1.0, 2, 3, 1]))
    ramp = np.mgrid[:20, :9, :4][0].astype(np.float32)
    for spacing in ((2.0, 2, 3), (0.5, 1, 3), (3.0, 3, 3), (1.0, 2, 3), (50.0, 50, 50)):
        new = respaced(grid, spacing)
        assert np.allclose(new.spacing, spacing, rtol=1e-3)
        assert min(new.shape) >= 1
        middle = [(side - 1) / 2 for side in new.shape] + [1]  # stays
        assert np.allclose(new.affine @ middle, grid.affine @ [9.5, 4, 1.5, 1])
        assert np.allclose(resampled(np.full(grid.shape, 7, np.float32), grid, new), 7)
        height = (
            new.affine @ np.stack([np.arange(new.shape[0]), *np.zeros((2, new.shape[0])), np.ones(new.shape[0])])
        )[0]
        inside = slice(2, -2)  # a ramp stays one, but for the ends, which repeat
        assert np.allclose(resampled(ramp, grid, new)[inside, 0, 0], height[inside], atol=1e-4)
        labels = nearest(ramp.astype(np.int16), grid, new)[:, 0, 0]
        assert np.abs(labels - height).max() <= 0.5 + 1e-6 or spacing[0] == 50
    same = respaced(grid, (1.0, 2, 3))
    assert np.array_equal(resampled(ramp, grid, same), ramp)


def test_resampling_weighs_all_old_voxels_within_reach_and_no_others() -> None:
    for old, ratio in ((7, 0.3), (8, 1.0), (9, 1.5), (10, 2.0), (12, 3.7), (3, 40.0), (1, 0.2)):
        grid, values = VoxelGrid((old, 1, 1), np.eye(4)), noise(0, (old, 1, 1)).astype(np.float32)
        new = respaced(grid, (ratio, 1.0, 1.0))
        places = (np.arange(new.shape[0]) - (new.shape[0] - 1) / 2) * ratio + (old - 1) / 2
        hat = np.maximum(0, 1 - np.abs(places.clip(0, old - 1)[:, None] - np.arange(old)) / max(ratio, 1))
        mean = (hat / hat.sum(axis=1, keepdims=True)) @ values[:, 0, 0]
        assert np.allclose(resampled(values, grid, new)[:, 0, 0], mean, rtol=1e-5), ratio


def test_a_long_line_of_voxels_is_resampled_in_little_memory() -> None:
    grid, values = VoxelGrid((2**17, 1, 1), np.eye(4)), np.ones((2**17, 1, 1), np.float32)
    new = respaced(grid, (1.1, 1.0, 1.0))
    tracemalloc.start()
    try:
        assert np.allclose(resampled(values, grid, new), 1)
        assert tracemalloc.get_traced_memory()[1] < 2**27  # of the 2^37 that every pair of an old and a new one takes
    finally:
        tracemalloc.stop()


def test_a_handedness_of_zero_is_one_as_the_standard_has_it(tmp_path: Path) -> None:
    for number, handedness in enumerate((0, 1)):
        spoilt(only_quaternion(handedness))(tmp_path / str(number))
    zero, one = (VolumeFile("x.nii").grid(tmp_path / name) for name in "01")
    assert zero.shape == one.shape
    np.testing.assert_array_equal(zero.affine, one.affine)


def test_numbers_beyond_float32_are_infinite_without_a_warning(tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii", np.full((2, 2, 2), 1e300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, _ = VolumeFile("x.nii").read(tmp_path)
    assert np.isinf(values).all()


def test_between_two_grids_nothing_is_larger_than_the_larger_of_both() -> None:
    """Axes that shrink come first: one slice of 512 x 512 pixels of 0.01 mm becomes 100 x 5 x 5 voxels of 1 mm."""
    grid = VoxelGrid((1, 512, 512), np.diag([100.0, 0.01, 0.01, 1.0]))
    new, values = respaced(grid, (1.0, 1.0, 1.0)), np.ones(grid.shape, np.float32)
    labels = np.ones(grid.shape, np.int8)
    tracemalloc.start()
    found, same = resampled(values, grid, new), nearest(labels, grid, new)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == same.shape == (100, 5, 5)
    assert found == pytest.approx(1)
    assert peak < 8 * values.nbytes


def test_more_voxels_than_the_limit_are_not_made(tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii", noise(0, (10, 2, 2)), (3e8, 3e8, 3e8))
    (subject,) = find_subjects(tmp_path).subjects
    for spacing in (1.0, 1e-300):
        with pytest.raises(Unreadable, match=r"x\.nii: .*LIGHTSPAN_MAX_NUMBERS"):
            VolumeDecoder((spacing,) * 3, Percentiles()).grid(subject, tmp_path)


def test_intensities_are_finite_whatever_a_scan_holds() -> None:
    few = np.array([0, 1, 2, 3, 4, np.nan, np.inf], np.float32)
    assert finite(few).tolist() == [0, 1, 2, 3, 4, 0, 0]
    with pytest.raises(ValueError, match="finite"):
        finite(np.full(3, np.nan, np.float32))
    assert IntensityWindow(1, 3)(few[:5]).tolist() == [0, 0, 0.5, 1, 1]
    assert Percentiles(0, 100)(few[:5]).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    scored = ZScore()(few[:5])
    assert scored[0] == 0
    assert scored[1:].mean() == pytest.approx(0, abs=1e-6)
    assert scored[1:].std() == pytest.approx(1)
    for intensity in (Percentiles(), ZScore()):
        for constant in (0.0, 5.0, 1e-30):
            assert not intensity(np.full((2, 2), constant, np.float32)).any()
    for wrong in (lambda: IntensityWindow(3, 1), lambda: IntensityWindow(0, float("nan")), lambda: Percentiles(50, 20)):
        with pytest.raises(UserError, match="low="):
            wrong()


def test_subjects_follow_from_patterns(tmp_path: Path) -> None:
    for name in ("AD/a1/a1_t1", "AD/a1/a1_t2", "CN/b_2/b_2_t1", "CN/b_2/b_2_seg", "CN/c/c_seg", "CN/c/other"):
        write_nifti(tmp_path / f"{name}.nii.gz", noise(0, (1, 1, 1)))
    patterns = {"t1": "{class}/{subject}/{subject}_t1.nii.gz", "t2": "{class}/{subject}/*_t2"}
    found = find_subjects(tmp_path, patterns, "**/{subject}_seg")
    assert [(one.name, one.group) for one in found.subjects] == [("a1", "AD"), ("b_2", "CN")]
    assert [[file and file.name for file in one.files] for one in found.subjects] == [
        ["AD/a1/a1_t1.nii.gz", "AD/a1/a1_t2.nii.gz"],
        ["CN/b_2/b_2_t1.nii.gz", None],
    ]
    assert [one.segmentation and one.segmentation.name for one in found.subjects] == [None, "CN/b_2/b_2_seg.nii.gz"]
    assert found.classes == ["AD", "CN"]
    assert found.remarks == [
        "1 volumes fit no pattern and were left out",
        "1 segmentations without a volume were left out",
    ]
    wrong = [
        ({"t1": "{subject}_t9"}, None, r"no volume .* fits '\{subject\}_t9', the pattern of t1"),
        ({"t1": "**/{patient}_t1"}, None, r"\{patient\} is none of \{subject\}"),
        ({"t1": "**/*_t1", "t2": "**/{subject}_t2"}, None, "modalities.t1.*put {subject}"),
        ({"t1": "**/{subject}_t1"}, "**_seg", "segmentation=.*put {subject}"),
        ({"t1": "**/{subject}_*"}, None, "a1_t1.nii.gz and AD/a1/a1_t2.nii.gz .* are both t1 of a1"),
        ({}, None, "modalities is empty"),
    ]
    for modalities, segmentation, said in wrong:
        with pytest.raises(UserError, match=said):
            find_subjects(tmp_path, modalities, segmentation)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        find_subjects(tmp_path / "empty")


def test_neighbouring_wildcards_are_one(tmp_path: Path) -> None:
    write_nifti(tmp_path / f"{'a' * 60}/x.nii", noise(0, (1, 1, 1)))
    for pattern in ("********{subject}********!", "**/**/**/**/**/**/{subject}/!"):
        with pytest.raises(UserError, match="no volume"):
            find_subjects(tmp_path, {"t1": pattern})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the time of an expression")
def test_a_pattern_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / f"{'a' * 200}.nii", noise(0, (1, 1, 1)))
    monkeypatch.setenv(SECONDS.setting, "1")
    with pytest.raises(UserError, match=r"modalities\.t1.*wildcards"):
        find_subjects(tmp_path, {"t1": "*a" * 20 + "!"})


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write_nifti(tmp_path / "outside" / "x.nii", noise(0))
    write_nifti(tmp_path / "in" / "a.nii", noise(1))
    (tmp_path / "in" / "b.nii").symlink_to(outside)
    found = find_subjects(tmp_path / "in")
    assert [one.name for one in found.subjects] == ["a"]
    assert found.remarks == ["1 links were left out (data.init_args.links=follow reads them)"]
    assert [one.name for one in find_subjects(tmp_path / "in", links="follow").subjects] == ["a", "b"]
