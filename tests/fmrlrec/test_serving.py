"""What is served: compact models, tables for other systems, states that move step by step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

import matryoshkafy as mk
from examples.fmrlrec import pipeline
from examples.fmrlrec.config import DataError, RunError, replace
from examples.fmrlrec.data import left_pad
from examples.fmrlrec.nesting import build, nest
from examples.fmrlrec.pipeline import Material
from examples.fmrlrec.serving.compact import compact, export_items, project
from examples.fmrlrec.serving.live import Live, Unknown

ROOT = Path(__file__).parents[2]
SEQUENCES = torch.tensor([[0, 0, 3, 4, 9], [5, 6, 7, 8, 1]])


def doll_of(material: Material, config: Any, **changes: Any):
    config = replace(config, changes)
    doll = nest(build(config, 40, material.features, 8), config)
    with torch.no_grad():
        for parameter in doll.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return doll.eval(), config


@pytest.mark.parametrize(
    ("modality", "how"),
    [("both", {"norm": "prefix"}), ("id", {"norm": "block"}), ("both", {"nesting": "sliced"})],
    ids=str,
)
def test_a_compact_model_scores_as_its_slice(modality, how, material, tiny) -> None:
    doll, config = doll_of(material, tiny, modality=modality, **how)
    for size in doll.sizes:
        part, model = mk.slice(doll, size).eval(), compact(doll, config, size)
        with torch.no_grad():
            torch.testing.assert_close(model(SEQUENCES), part(SEQUENCES), atol=1e-5, rtol=1e-4)
        assert model.items().shape == (41, size)
        assert not any("features" in name for name in model.state_dict())


def test_a_compact_model_that_scores_otherwise_is_refused(material, tiny) -> None:
    doll, config = doll_of(material, tiny, norm="block")
    with pytest.raises(RunError, match="scores unlike its slice"):
        compact(doll, replace(config, {"norm": "prefix"}), 8)
    with pytest.raises(RunError, match="size 3 was asked for"):
        compact(doll, config, 3)


@pytest.fixture(scope="module")
def served(material: Material, tiny) -> tuple[Any, Any, dict[int, Any]]:
    doll, config = doll_of(material, tiny)
    return doll, config, {size: compact(doll, config, size) for size in doll.sizes}


def test_exported_tables_score_as_the_model_does(served, material, tmp_path: Path) -> None:
    faiss, usearch = pytest.importorskip("faiss"), pytest.importorskip("usearch.index")
    model = served[2][4]
    export_items(model, material.data, tmp_path)
    stored = load_file(tmp_path / "items.safetensors")
    with torch.no_grad():
        hidden = model.encode(SEQUENCES, model.items())[:, -1].numpy()
        expected = model(SEQUENCES)[:, -1, 1:].numpy()
    np.testing.assert_allclose(hidden @ stored["vectors"].T + stored["bias"], expected, atol=1e-5)
    np.testing.assert_array_equal(np.load(tmp_path / "items.npy"), stored["vectors"])
    table = pl.read_parquet(tmp_path / "items.parquet")
    assert table["item_id"].to_list() == [str(i) for i in material.data.catalogue["item_id"]]
    np.testing.assert_array_equal(np.stack(table["vector"].to_list()), stored["vectors"])
    assert json.loads((tmp_path / "items.json").read_text())["title"][:2] == ["Thing 0", "Thing 1"]
    asked = np.concatenate([hidden, np.ones((2, 1), np.float32)], axis=1)
    best = expected.argmax(1).tolist()
    assert (
        faiss.read_index(str(tmp_path / "items.faiss")).search(asked, 1)[1][:, 0].tolist() == best
    )
    index = usearch.Index.restore(str(tmp_path / "items.usearch"))
    assert index.search(asked, 1).keys[:, 0].tolist() == best


HISTORIES = {"ann": np.array([3, 4, 9]), "bob": np.array([5, 6, 7, 8, 1]), "cy": np.array([], int)}
IDS = [str(number) for number in range(101, 141)]


def expected_top(model: Any, history: list[int], count: int) -> list[str]:
    """By the whole history at once, as training sees it."""
    with torch.no_grad():
        scores = model(torch.from_numpy(left_pad([np.array(history)], max(2, len(history)))))[0, -1]
    scores[[0, *history]] = -torch.inf
    return [IDS[i - 1] for i in scores.topk(count).indices.tolist()]


@pytest.mark.parametrize("index", ["exact", "hnsw", "usearch"])
def test_stepwise_answers_are_those_of_the_whole_history(index: str, served) -> None:
    if index != "exact":
        pytest.importorskip({"hnsw": "faiss", "usearch": "usearch"}[index])
    live = Live(served[2], IDS, HISTORIES, index=index)
    for item in ("120", "103", "140"):
        live.event("ann", item)
        live.event("new", item)
    histories = {"ann": [3, 4, 9, 20, 3, 40], "bob": [5, 6, 7, 8, 1], "new": [20, 3, 40]}
    for user, history in histories.items():
        for size, model in served[2].items():
            found = [name for name, _ in live.top(user, size, 5)]
            assert found == expected_top(model, history, 5), (user, size)


def test_events_survive_a_killed_service(served, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    live = Live(served[2], IDS, HISTORIES)
    live.replay(log)
    live.event("ann", "120")
    with log.open("a") as stream:
        stream.write('["ann", "1')
    for item in ("121", "122"):
        live = Live(served[2], IDS, HISTORIES)
        live.replay(log)
        live.event("ann", item)
    assert live.seen[0] == [3, 4, 9, 20, 21, 22]
    assert [n for n, _ in live.top("ann", 8, 3)] == expected_top(served[2][8], live.seen[0], 3)


def test_a_long_log_is_replayed_many_users_at_a_time(served, tmp_path: Path) -> None:
    """More users than there was room for, and answers are those over the whole history."""
    log, source = tmp_path / "events.jsonl", np.random.default_rng(0)
    known = {user: list(items) for user, items in HISTORIES.items()}
    drawn = zip(source.integers(0, 2500, 6000), source.integers(1, 41, 6000), strict=True)
    events = [(f"u{user}", int(item)) for user, item in drawn] + [("bob", 2), ("cy", 7)]
    for user, item in events:
        known.setdefault(user, []).append(item)
    log.write_text("".join(json.dumps([user, IDS[item - 1]]) + "\n" for user, item in events))
    live = Live({4: served[2][4]}, IDS, HISTORIES)
    live.replay(log)
    for user in ["ann", "bob", "cy", *(f"u{number}" for number in range(0, 2500, 250))]:
        if user in known:
            found = [item for item, _ in live.top(user, 4, 3)]
            assert found == expected_top(served[2][4], known[user], 3)


def test_a_new_item_takes_part_without_training(served, material) -> None:
    doll, config, models = served
    live = Live(models, IDS, HISTORIES)
    features = material.features.joined(config.modality)[[9]]
    rows = {size: project(doll, size, features)[0] for size in models}
    for size, model in models.items():
        np.testing.assert_allclose(rows[size], model.items()[9].detach(), atol=1e-5)
    live.add("fresh", rows)
    names = [name for name, _ in live.top("bob", 8, 41)]
    assert "fresh" in names and len(names) == 41 - 5
    assert live.event("bob", "fresh") == 6
    with pytest.raises(RunError, match="is there already"):
        live.add("fresh", rows)


def test_a_state_begins_late_and_nothing_is_recommended_twice(served) -> None:
    live = Live(served[2], IDS, {"bob": np.array([5, 6, 7, 8, 1])}, length=1)
    found = live.top("bob", 8, 40)
    with torch.no_grad():
        scores = served[2][8](torch.tensor([[0, 1]]))[0, -1]
    assert {IDS[i - 1] for i in (5, 6, 7, 8, 1)}.isdisjoint(dict(found)) and len(found) == 35
    for name, score in found:
        assert score == pytest.approx(float(scores[IDS.index(name) + 1]), rel=1e-4, abs=1e-5)


def test_more_users_than_there_was_room_for(served) -> None:
    live = Live({2: served[2][2]}, IDS, {})
    for number in range(1030):
        live.event(f"user {number}", IDS[number % 40])
    assert [n for n, _ in live.top("user 1029", 2, 3)] == expected_top(
        served[2][2], [1029 % 40 + 1], 3)  # fmt: skip


def test_unknown_names_are_told(served) -> None:
    live = Live(served[2], IDS, HISTORIES)
    for call, words in (
        (lambda: live.top("zoe", 8, 1), "no user 'zoe'"),
        (lambda: live.top("ann", 5, 1), "no size 5; served are 2, 4, 8"),
        (lambda: live.event("ann", "7"), "no item '7'"),
    ):
        with pytest.raises(Unknown, match=words):
            call()
    with pytest.raises(RunError, match="expected exact, hnsw"):
        Live(served[2], IDS, HISTORIES, index="annoy")


@pytest.fixture(scope="module")
def shop(served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from PIL import Image

    from examples.fmrlrec.serving.service import Shop

    picture = tmp_path_factory.mktemp("pictures") / "one.jpg"
    Image.new("RGB", (20, 20), (200, 30, 30)).save(picture)
    titles = {name: f"Thing {name}" for name in IDS}
    return Shop(Live(served[2], IDS, HISTORIES), titles, dict.fromkeys(IDS[:20], picture))


@pytest.fixture
def client(shop) -> Any:
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from examples.fmrlrec.serving.service import application

    return TestClient(application(shop))


def test_recommendations_over_http(client, shop) -> None:
    found = client.get("/recommend", params={"user": "bob", "size": [2, 8], "k": 3}).json()
    assert list(found["sizes"]) == ["2", "8"]
    assert [i["id"] for i in found["sizes"]["8"]] == [n for n, _ in shop.live.top("bob", 8, 3)]
    assert found["sizes"]["8"][0]["title"].startswith("Thing ")
    assert client.get("/health").json()["sizes"] == [2, 4, 8]
    assert client.get("/users").json()["users"][:2] == ["ann", "bob"]
    assert client.get("/items/101/image").headers["content-type"] == "image/jpeg"


def test_an_event_moves_the_next_answer(client, served) -> None:
    assert client.post("/events", json={"user": "dan", "item": "105"}).json()["events"] == 1
    found = client.get("/recommend", params={"user": "dan", "size": 4, "k": 4}).json()
    assert [i["id"] for i in found["sizes"]["4"]] == expected_top(served[2][4], [5], 4)
    assert client.get("/users/dan").json()["history"][0]["id"] == "105"


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "words"),
    [
        ("GET", "/recommend?user=zoe", None, 404, "no user 'zoe'"),
        ("GET", "/recommend?user=bob&size=5", None, 404, "served are 2, 4, 8"),
        ("GET", "/recommend?user=bob&size=many", None, 422, "size.0: Input should be a valid int"),
        ("GET", "/recommend?user=bob&k=1000", None, 422, "k: Input should be less than"),
        ("GET", "/recommend", None, 422, "user: Field required"),
        ("POST", "/events", {"user": "bob", "item": "7"}, 404, "no item '7'"),
        ("POST", "/events", {"user": "bob"}, 422, "item: Field required"),
        ("POST", "/items", {"item_id": "x"}, 404, "takes no new items"),
        ("GET", "/items/140/image", None, 404, "no picture of item '140'"),
        ("GET", "/users/zoe", None, 404, "no user 'zoe'"),
        ("GET", "/users/a/b", None, 404, "no user 'a/b'"),
        ("GET", "/nowhere", None, 404, "/docs lists the paths"),
        ("GET", "/events", None, 405, "Method Not Allowed"),
    ],
)
def test_bad_requests_are_told(client, method, path, given, status, words) -> None:
    answer = client.request(method, path, json=given)
    assert answer.status_code == status and words in answer.json()["error"]


def test_metrics_count_by_route(client) -> None:
    client.get("/recommend", params={"user": "bob"})
    client.get("/recommend", params={"user": "zoe"})
    text = client.get("/metrics").text
    assert 'fmrlrec_requests_total{path="/recommend",status="200"} 1.0' in text
    assert 'fmrlrec_requests_total{path="/recommend",status="404"} 1.0' in text
    assert 'fmrlrec_request_seconds_count{path="/recommend"} 2.0' in text
    assert 'fmrlrec_size_bytes{size="8"}' in text


@pytest.fixture
def address(shop) -> Iterator[str]:
    """The service on a free port, in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    from examples.fmrlrec.serving.service import application

    server = uvicorn.Server(uvicorn.Config(application(shop), port=0, log_level="warning"))
    started = threading.Event()
    real = server.startup

    async def startup(*args: Any, **kwargs: Any) -> None:
        await real(*args, **kwargs)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_the_page_shows_every_size_side_by_side(address: str, shop, tmp_path: Path) -> None:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"):
        options.add_argument(word)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.get(address)
        # The page replaces its lists while they are looked at.
        wait = WebDriverWait(browser, 120, ignored_exceptions=[StaleElementReferenceException])
        columns = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#sizes section"))
        assert [c.find_element(By.TAG_NAME, "h2").text for c in columns] == [
            "size 2", "size 4", "size 8"]  # fmt: skip
        tops = [column.location["y"] for column in columns]
        assert len(set(tops)) == 1, "side by side"
        expected = [name for name, _ in shop.live.top("ann", 8, 10)]
        boxes = columns[2].find_elements(By.CLASS_NAME, "item")
        assert [box.get_attribute("data-id") for box in boxes] == expected
        assert [b.find_element(By.CLASS_NAME, "title").text for b in boxes] == [
            f"Thing {name}" for name in expected]  # fmt: skip
        loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
        assert browser.find_elements(By.CSS_SELECTOR, "#sizes img")
        browser.execute_script(
            "document.images.forEach(i => i.loading = 'eager')".replace(
                "document.images.forEach", "[...document.images].forEach"
            )
        )
        wait.until(lambda b: b.execute_script(loaded))
        boxes[0].click()
        wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#history li")
                   .get_attribute("data-id") == expected[0])  # fmt: skip
        field = browser.find_element(By.ID, "user")
        field.clear()
        field.send_keys("zoe")
        field.submit()
        wait.until(lambda b: "no user 'zoe'" in b.find_element(By.ID, "message").text)
    finally:
        browser.quit()


def test_a_new_item_shows_no_file_outside_the_shop(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from PIL import Image

    from examples.fmrlrec.serving.service import picture_in

    shop = tmp_path / "shop"
    shop.mkdir()
    Image.new("RGB", (4, 4)).save(shop / "fine.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.jpg")
    (shop / "text.jpg").write_text("no picture")
    assert picture_in(shop, "fine.jpg") == shop / "fine.jpg"
    assert picture_in(shop, "") is None
    strange = ("a" * 5000 + ".jpg", "nul\0.jpg", ".", "..")
    for name in ("../outside.jpg", str(tmp_path / "outside.jpg"), "text.jpg", "gone.jpg", *strange):
        with pytest.raises(DataError, match="no picture that can be read in the folder"):
            picture_in(shop, name)


def test_new_items_survive_a_killed_service(served, material, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from examples.fmrlrec.serving import service
    from examples.fmrlrec.serving.recommending import NewItems

    doll, config, models = served
    features = material.features.joined(config.modality)[[9]]
    run = pipeline.Run(tmp_path, replace(config, {"data": str(tmp_path)}))
    encoded = NewItems(["Fresh"], features)
    monkeypatch.setattr(service, "encode_items", lambda *_: encoded)
    log = tmp_path / "items.jsonl"

    def started() -> service.Newcomers:
        shop = service.Shop(Live(models, IDS, HISTORIES), {}, {})
        return service.Newcomers(run, material, doll, shop, log)

    assert started().add({"item_id": "new"}) == "Fresh"
    with log.open("a") as stream:
        stream.write('{"item_id": "101"}\n{"item_id": "hal')
    again = started()
    again.replay()
    assert "new" in again.shop.live.items, "and neither what is there already nor the cut line"
    assert len(again.shop.live.items) == 41
    again.add({"item_id": "newer"})
    last = started()
    last.replay()
    assert len(last.shop.live.items) == 42


@pytest.mark.slow
def test_under_load_and_killed_every_answer_is_right() -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    words = "--items 60 --users 40 --sizes 8,16 --seconds 4 --restarts 1 --clients 4".split()
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.fmrlrec_load", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 failed, 0 wrong" in done.stdout and "size 16" in done.stdout
