"Whatever comes over the network instead of an answer: one clear error, soon, and nothing left behind."

import contextlib
import errno
import hashlib
import io
import re
import socket
import threading

import huggingface_hub
import pytest
import torch
from cxr_synth.base import network
from cxr_synth.base.files import CxrError
from cxr_synth.base.network import download_file, hub_commit, network_failure, patient_hub
from cxr_synth.base.settings import PROMPTS, DataConfig
from cxr_synth.data.sources import hub_source, hub_tables, open_source
from cxr_synth.diffusion.hub import check_source, hub_configs
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.images.networks import find_weights
from fake_hub import BAD, COMMIT, PAGE, SPECIAL, STALLED, fake_hub, soon
from huggingface_hub import constants
from huggingface_hub.utils import _http

ALL = [*BAD, *SPECIAL]
ANSWERED = ("401", "403", "404")
SAYS = {  # how the server answers -> a word that the message needs
    "html": "page",
    "html called json": "page",
    "loop": "circle",
    "empty": "JSON",
    "binary": "page",
    "401": "token|public",
    "403": "forbids",
    "404": "nothing of this name|public",
    "407": "proxy",
    "410": "410",
    "429": "fewer requests",
    "429 for an hour": "fewer requests",
    "500": "500",
    "502": "502",
    "503": "503",
    "silent": "does not answer",
    "drip": "does not answer",
    "hang up": "cut short",
    "cut": "cut short",
}


@pytest.fixture
def online(monkeypatch, tmp_path):
    "The Hub's library as it is with a network, impatient, its cache in the test's own folder."
    import datasets

    for name, value in dict(HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for name, seconds in dict(_EACH=0.5, _PATIENCE=0.5, _DEADLINE=3).items():
        monkeypatch.setattr(network, name, seconds)
    monkeypatch.setattr(network, "_SLOWEST", (2**16, 0.5))
    monkeypatch.setattr(network, "_TIMES", 2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield monkeypatch
    huggingface_hub.close_session()


def at(monkeypatch, url):
    "The Hub is there."
    import datasets

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)


def refusal(call, *args, **named):
    "The message with which a call is refused, in few enough lines; nothing else may be raised."
    with soon(8), pytest.raises(CxrError) as e:
        call(*args, **named)
    text = str(e.value)
    assert len(text.splitlines()) <= 5 and len(text) < 900, text
    return text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "The folder of a small pipeline, and that pipeline."
    root = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline(root / "tok", PROMPTS.values(), 32)
    save_pipeline(pipe, root / "base")
    return root / "base", pipe


# ---- the Hub, asked for a commit, a model, a data set


@pytest.mark.parametrize("how", ALL)
def test_a_model_of_a_hub_that_answers_badly(online, how):
    with fake_hub(how=how) as hub:
        at(online, hub.url)
        text = refusal(check_source, "me/mini")
    assert "me/mini" in text and hub.url in text and "Allowed: small-xray, sd21-base" in text
    assert re.search(SAYS.get(how, "form"), text), text
    if how not in ANSWERED:
        assert "HTTPS_PROXY" in text and "HF_HUB_OFFLINE=1" in text


@pytest.mark.parametrize("how", ALL)
def test_a_data_set_of_a_hub_that_answers_badly(online, how, tmp_path):
    with fake_hub(how=how) as hub:
        at(online, hub.url)
        text = refusal(hub_tables, "me/films", cache_dir=tmp_path / "cache")
    assert "me/films" in text and hub.url in text and "--data FOLDER" in text
    assert re.search(SAYS.get(how, "form"), text), text


@pytest.mark.parametrize("how", ["html", "json list", "loop", "silent", "503", "hang up", "cut"])
def test_the_command_line(online, how, cxr_synth_command, tmp_path):
    with fake_hub(how=how) as hub, soon(8):
        at(online, hub.url)
        ran = cxr_synth_command("data", tmp_path / "study", "--data", "hub")
    assert ran.status == 2 and hub.url in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("how", ["html", "json number", "silent", "500", "hang up", "cut", "404"])
@pytest.mark.parametrize("when", ["/tree/", "/resolve/"])
def test_a_hub_that_fails_later(online, model, how, when):
    "The commit was told; then the list of files, or the files, are answered badly."
    with fake_hub(model[0], how, when) as hub:
        at(online, hub.url)
        text = refusal(check_source, "me/mini")
    assert "me/mini" in text


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("how", STALLED)
@pytest.mark.parametrize("when", ["unet/config", "tokenizer.json", "unet/diffusion"])
def test_a_server_that_stalls_in_the_middle_of_a_file(online, model, how, when, resumes):
    "A clear error, and the second run goes on: what came whole is not asked for again."
    with fake_hub(model[0], how, when) as hub:
        hub.resumes = resumes
        at(online, hub.url)
        text = refusal(load_pipeline, "me/mini")
        assert "me/mini" in text and "HTTPS_PROXY" in text, text
        assert re.search("does not answer|cut short", text), text
        stalled, hub.how = set(hub.seen), ""
        hub.seen.clear()
        pipe = load_pipeline("me/mini")
        whole = [line for line in stalled if line.startswith("GET") and "model_index" in line]
        assert not set(whole) & set(hub.seen)
    for a, b in zip(pipe.unet.parameters(), model[1].unet.parameters()):
        assert torch.equal(a, b)


def unreachable(kind):
    "An address at which nobody answers."
    if kind == "no such name":
        return "http://no-such-host.invalid"
    if kind == "no such port":
        return "http://127.0.0.1:9"
    return "https://127.0.0.1:{}"


@pytest.mark.parametrize("kind", ["no such name", "no such port", "no TLS there"])
def test_nobody_there(online, kind):
    with fake_hub() as hub:
        url = unreachable(kind).format(hub.server_port)
        at(online, url)
        text = refusal(hub_commit, "me/mini")
    word = {"no such name": "DNS", "no such port": "listens", "no TLS there": "TLS"}[kind]
    assert url in text and word in text


def test_a_proxy_that_is_not_there(online):
    online.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    at(online, "http://hub.example.org")
    text = refusal(hub_commit, "me/mini")
    assert "secret" not in text and "HTTPS_PROXY" in text


@pytest.mark.parametrize("source", ["me/films", "me/mini"])
def test_offline_without_a_copy(online, source, tmp_path):
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    call = check_source if source == "me/mini" else hub_source
    assert "on this machine" in refusal(call, source)


# ---- the way through, and the way without a network


@pytest.mark.parametrize("how", ["silent", "html", "503", "hang up"])
def test_a_model_that_was_downloaded_before_serves(online, model, how, capsys):
    with fake_hub(model[0]) as hub:
        at(online, hub.url)
        loaded = load_pipeline("me/mini")
        assert check_source("me/mini").revision == COMMIT
        hub.how = how
        again = load_pipeline("me/mini")
    assert f"The copy on this machine is used: commit {COMMIT}" in capsys.readouterr().out
    for pipe in (loaded, again):
        for a, b in zip(pipe.unet.parameters(), model[1].unet.parameters()):
            assert torch.equal(a, b)


DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "one byte more": lambda data: data + b"x",
    "a page": lambda data: PAGE,
    "other bytes": lambda data: data[:-9] + b"\xff" * 9,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_model_that_comes_damaged_leaves_nothing_and_the_next_call_heals(online, model, kind):
    with fake_hub(model[0]) as hub:
        at(online, hub.url)
        hub.damage = lambda data: DAMAGE[kind](data) if len(data) > 50_000 else data
        assert "me/mini" in refusal(load_pipeline, "me/mini") or kind == "other bytes"
        hub.damage = lambda data: data
        load_pipeline("me/mini")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "A data set in the Hub's layout: two drawn films of each class."
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image as Column
    from PIL import Image

    folder = tmp_path_factory.mktemp("films")
    (folder / "data").mkdir()
    cells = []
    for k in range(4):
        noise = np.random.default_rng(k).integers(0, 256, (32, 32), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).save(out, "PNG")
        cells.append(dict(bytes=out.getvalue(), path=f"IM-{k:04d}-0001.png"))
    features = Features(image=Column(), label=ClassLabel(names=["NORMAL", "PNEUMONIA"]))
    table = Dataset.from_dict(dict(image=cells, label=[0, 0, 1, 1]), features=features)
    table.to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


def test_a_data_set_offline_is_the_copy_and_its_commit_unknown(online, films, tmp_path, capsys):
    with fake_hub(films) as hub:
        at(online, hub.url)
        first = hub_source("me/films", cache_dir=tmp_path / "cache")
        assert first.commit == COMMIT and len(first.rows) == 4
        hub.how = "html"
        later = hub_source("me/films", cache_dir=tmp_path / "cache")
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = hub_source("me/films", cache_dir=tmp_path / "cache")
    for source in (later, offline):
        assert source.rows == first.rows and source.commit == ""
        assert "commit is unknown" in " ".join(source.notes)
    assert capsys.readouterr().out.count("its commit is unknown") == 2


@pytest.mark.parametrize("kind", ["half", "a page"])
def test_a_table_that_comes_damaged(online, films, kind, tmp_path):
    with fake_hub(films) as hub:
        at(online, hub.url)
        hub.damage = lambda data: DAMAGE[kind](data) if data[:4] == b"PAR1" else data
        assert "me/films" in refusal(hub_tables, "me/films", cache_dir=tmp_path / "cache")
        hub.damage = lambda data: data
        assert hub_tables("me/films", cache_dir=tmp_path / "cache")[1] == COMMIT


# ---- a network's weights


def folder_is_empty(folder):
    return not folder.exists() or not any(folder.rglob("*"))


@pytest.mark.parametrize("how", [h for h in ALL if not h.startswith("json") and h != "binary"])
def test_weights_of_a_server_that_answers_badly(online, how, tmp_path):
    online.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with fake_hub(how=how) as hub:
        text = refusal(find_weights, "net-0123abcd.pth", f"{hub.url}/net-0123abcd.pth")
    assert hub.url in text and "net-0123abcd.pth" in text and "--quality.weights FOLDER" in text
    assert not [p for p in (tmp_path / "torch").rglob("*") if p.is_file()]


@pytest.mark.parametrize("how", ["json list", "binary"])
def test_another_file_than_the_name_says(online, how, tmp_path):
    with fake_hub(how=how) as hub:
        assert "SHA-256" in refusal(download_file, hub.url, tmp_path / "n/a.pth", "0123abcd")
    assert folder_is_empty(tmp_path / "n")


@pytest.mark.parametrize("kind", ["no such name", "no such port", "no TLS there"])
def test_weights_from_nowhere(online, kind, tmp_path):
    with fake_hub() as hub:
        url = unreachable(kind).format(hub.server_port)
        text = refusal(download_file, url + "/net.pth", tmp_path / "n/net.pth")
    assert url in text and folder_is_empty(tmp_path / "n")


def test_a_full_disk_is_not_the_networks_fault(online, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "net.pth")

    online.setattr(network, "_fetch", full)
    with pytest.raises(OSError, match="No space left") as e:
        download_file("http://127.0.0.1:9/net.pth", tmp_path / "net.pth")
    assert not isinstance(e.value, CxrError)


def test_two_at_once_and_a_half_one_before(online, tmp_path):
    "Two threads fetch the same file; then half of it lies there and a new call makes it whole."
    data = bytes(range(256)) * 4096
    (tmp_path / "files").mkdir()
    (tmp_path / "files/net.bin").write_bytes(data)
    name, digest = tmp_path / "out/net.bin", hashlib.sha256(data).hexdigest()[:8]
    with fake_hub(tmp_path / "files") as hub:
        url = f"{hub.url}/x/resolve/main/net.bin"
        both = [threading.Thread(target=download_file, args=(url, name, digest)) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert name.read_bytes() == data and [p.name for p in name.parent.iterdir()] == ["net.bin"]
        hub.damage = lambda data: data[:-1]
        refusal(download_file, url, tmp_path / "out/other.bin", digest)
        hub.damage = lambda data: data
        assert download_file(url, tmp_path / "out/other.bin", digest).read_bytes() == data


# ---- words


@pytest.mark.parametrize(
    "error, word",
    [
        (TimeoutError("timed out"), "does not answer"),
        (ConnectionResetError(104, "Connection reset by peer"), "cut short"),
        (ConnectionRefusedError(111, "Connection refused"), "listens"),
        (socket.gaierror(-2, "Name or service not known"), "DNS"),
        (KeyError("id"), "another form"),
        (TypeError("argument after ** must be a mapping"), "another form"),
        (ValueError("said hf_abcdefgh"), r"hf_\*\*\*"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_words(error, word):
    assert re.search(word, network_failure(error))


def test_the_library_is_left_as_it_was():
    before = _http._GLOBAL_CLIENT_FACTORY
    with contextlib.suppress(ZeroDivisionError), patient_hub():
        assert _http._GLOBAL_CLIENT_FACTORY is not before
        raise ZeroDivisionError
    assert _http._GLOBAL_CLIENT_FACTORY is before


def test_open_source_names_the_set(online, tmp_path):
    from cxr_synth.base.records import Study

    with fake_hub(how="json dict") as hub:
        at(online, hub.url)
        text = refusal(open_source, Study(tmp_path), DataConfig(source="hub"))
    assert DataConfig().hub_id in text


def test_configs_are_asked_once(online, model):
    with fake_hub(model[0]) as hub:
        at(online, hub.url)
        assert hub_configs("me/mini").name == COMMIT
        assert sum("/tree/" in line for line in hub.seen) == 1


# ---- sending


@pytest.mark.parametrize(
    "how",
    ["html", "json dict", "json list", "json null", "empty", "loop", "503", "silent", "hang up"],
)
def test_a_push_that_is_answered_badly(online, tmp_path, how):
    from cxr_synth.ship.hub_push import Shipment, _upload, naming_hub_errors

    def send(url):
        (tmp_path / "README.md").write_text("card")
        with naming_hub_errors("anna/lungs"):
            _upload(Shipment(url, "card", {"README.md": 4}), tmp_path, "anna/lungs", True)

    online.setenv("HF_TOKEN", "hf_abcdefgh")
    with fake_hub(how=how) as hub:
        at(online, hub.url)
        text = refusal(send, hub.url)
        sent = [line for line in hub.seen if "/commit/" in line or "preupload" in line]
    assert "cannot push to anna/lungs" in text and "abcdefgh" not in text
    assert not sent  # nothing went anywhere before the data set was there
