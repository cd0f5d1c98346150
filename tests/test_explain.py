"""Proves: what explain() says is what a load then does, and saying it reads no tensor."""

import re

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import STOCK, outcome, write_raw
from patch_helpers import PageCache, drop_from_cache, settle

import stx_patch

MIB = 1 << 20


@pytest.fixture
def large(tmp_path):
    """Eight tensors of 4 MiB, not in the page cache."""
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file({f"t{i}": torch.full((MIB,), float(i)) for i in range(8)}, path)
    assert drop_from_cache(path)
    return path


FILTERS = {
    "all": None,
    "none": [],
    "one": "t3",
    "neighbours": ["t3", "t4"],
    "apart": {"t0", "t7"},
    "callable": lambda key: key.nbytes and key in ("t1", "t5", "t6"),
    "filters": stx_patch.filters.prefixes("t2"),
}
SPANS = {"all": 1, "none": 0, "one": 1, "neighbours": 1, "apart": 2, "callable": 2, "filters": 1}


@pytest.mark.parametrize("name", FILTERS)
def test_a_load_does_what_was_explained(large, name):
    told = stx_patch.explain(large, FILTERS[name])
    (file,) = told.files
    assert file.native and told.native and file.reason is None and file.tensors_by_stock == 0
    assert file.policy == ("nothing" if name == "none" else "dense" if name == "all" else "sparse")
    assert len(file.spans) == SPANS[name]
    drop_from_cache(large)
    stx_patch.reset_stats()
    tensors = stx_patch.load_file(large, tensor_filter=FILTERS[name]) if name != "none" else {}
    settle()
    found = stx_patch.stats()
    assert file.tensors_kept == len(tensors) == sum(span.tensors for span in file.spans)
    assert file.bytes_kept == sum(tensor.nbytes for tensor in tensors.values())
    assert file.tensors_kept + file.tensors_skipped == 8
    assert file.bytes_kept + file.bytes_skipped == 8 * 4 * MIB
    if name != "none":
        assert (found.bytes_read, found.requests) == (file.bytes_expected, file.reads)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_a_load_into_memory_of_our_own_does_what_was_explained(large, name, warm):
    """Warm or not, it is read; retries would not be foreseen, and there are none."""
    if warm:
        large.read_bytes()
    (file,) = stx_patch.explain(large, FILTERS[name], backend="pread").files
    assert file.native and file.reason is None and len(file.spans) == SPANS[name]
    stx_patch.reset_stats()
    with stx_patch.patched(FILTERS[name]):
        tensors = safetensors.torch.load_file(large, backend="pread")
    found = stx_patch.stats()
    assert file.tensors_kept == len(tensors) and file.tensors_kept + file.tensors_skipped == 8
    assert (found.bytes_read, found.requests) == (file.bytes_expected, file.reads)
    assert found.retries == 0
    assert name == "none" or file.policy == "owned"


def test_the_spans_are_where_the_tensors_lie(large):
    content = large.read_bytes()
    (file,) = stx_patch.explain(large, ["t1", "t4", "t5"]).files
    shown = [content[span.begin_bytes : span.end_bytes] for span in file.spans]
    expected = [torch.full((MIB,), float(i)).numpy().tobytes() for i in (1, 4, 5)]
    assert shown == [expected[0], expected[1] + expected[2]]


def test_no_tensor_is_read_and_nothing_counted(large):
    stx_patch.reset_stats()
    before = stx_patch.stats()
    stx_patch.explain(large, "t6")
    stx_patch.explain(large, "t6", backend="pread")
    assert stx_patch.stats() == before
    cache = PageCache(large)
    assert cache.resident_bytes(16 * MIB, 32 * MIB) == 0
    cache.close()


def test_a_warm_file_asks_for_nothing(large):
    large.read_bytes()
    (file,) = stx_patch.explain(large, "t6").files
    assert file.policy == "warm" and file.bytes_cached >= file.size_bytes * 0.9
    assert file.size_bytes == large.stat().st_size


STOCKS = {
    "framework": ({"framework": "np"}, "framework np"),
    "device": ({"device": "cuda:0"}, "device cuda:0"),
    "both": ({"device": "cuda:0", "backend": "pread"}, "device cuda:0"),
}


@pytest.mark.parametrize("name", STOCKS)
def test_what_goes_to_stock_says_why(sample, name):
    keywords, reason = STOCKS[name]
    (file,) = stx_patch.explain(sample, ["matrix", "cube"], **keywords).files
    assert not file.native and file.reason == reason and file.policy == "stock"
    assert (file.tensors_kept, file.tensors_skipped) == (2, 3) and file.tensors_by_stock == 2
    assert (file.bytes_kept, file.bytes_skipped) == (24 * 4 + 60 * 2, 7 * 8 + 4)
    assert file.bytes_expected is None and reason in str(file)


def test_a_file_that_only_stock_takes(tmp_path):
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    path = write_raw(tmp_path / "double", b'{"a":' + entry + b',"a":' + entry + b"}", b"x")
    (file,) = stx_patch.explain(path).files
    assert not file.native and file.reason.startswith("file refused") and file.tensors_kept == 1


def test_tensors_that_stock_would_make_are_told(tmp_path):
    header = {"six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    path = write_raw(tmp_path / "six", header, b"abc")
    told = stx_patch.explain(path)
    assert told.native and told.files[0].tensors_by_stock == 1
    assert "made by safetensors" in str(told)


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"\2\0\0\0\0\0\0\0{}x", None])
def test_a_bad_file_raises_what_loading_it_raises(tmp_path, content):
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    assert outcome(stx_patch.explain, path) == outcome(STOCK.safe_open, path, "pt")


def test_a_filters_own_error_comes_through(sample):
    error = safetensors.SafetensorError("mine")

    def refuse(key):
        raise error

    with pytest.raises(safetensors.SafetensorError) as caught:
        stx_patch.explain(sample, refuse)
    assert caught.value is error
    with pytest.raises(TypeError):
        stx_patch.explain(sample, 3)
    with pytest.raises(ValueError, match="not both"):
        stx_patch.explain(sample, "a", include_keys=["a"])


def test_the_filter_in_force_counts(sample):
    with stx_patch.patched(tensor_filter=["matrix", "cube"]):
        assert stx_patch.explain(sample).tensors_kept == 2
        assert stx_patch.explain(sample, "matrix").tensors_kept == 1
    assert stx_patch.explain(sample, include_keys=["cube"]).tensors_kept == 1


def test_several_files_are_summed_up(large, sample):
    told = stx_patch.explain([large, sample], ["t0", "matrix"])
    assert [file.filename for file in told.files] == [str(large), str(sample)]
    assert told.tensors_kept == 2 and told.bytes_kept == 4 * MIB + 96
    assert told.tensors_skipped == 7 + 4
    assert told.bytes_skipped == 7 * 4 * MIB + 7 * 8 + 4 + 120
    assert told.reads == sum(file.reads for file in told.files)
    assert told.bytes_expected == sum(file.bytes_expected for file in told.files)
    names = (name for name in ["t0", "matrix"])
    assert stx_patch.explain([large, sample], include_keys=names).tensors_kept == 2
    assert str(told).splitlines()[-1].startswith("total: 2 files, 2 native; 2 tensors kept, 4.2 MB")
    assert told.as_dict()["files"][0]["spans"][0]["tensors"] == 1


def test_it_reads_well(large):
    expected = """\
{path}: native; exactly what is kept is read beside the consumer
  kept     1 tensor of 8, 4.2 MB of 33.6 MB
  skipped  7 tensors, 29.4 MB
  to read  4.3 MB with the header: 3 reads of 1 span; in the page cache now: N"""
    shown = str(stx_patch.explain(large, "t3"))
    shown = re.sub("now: .*", "now: N", shown.replace(str(large), "{path}"))
    assert shown == expected
