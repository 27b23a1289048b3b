import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

from bloodcell_fastai import BloodcellError, export_run
from bloodcell_fastai.serving.export import hub as hub_module


@pytest.fixture
def hub():
    """A stand-in for the Hugging Face Hub: it keeps what it is sent and checks nothing else."""
    requests, stored = [], {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, value: dict | None = None, status: int = 200) -> None:
            content = json.dumps(value or {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            path, body = self.path.split("?")[0], self.body()
            requests.append((path, body, self.headers.get("Authorization")))
            home = f"http://{self.headers['Host']}"
            if path == "/api/repos/create":
                self.answer({"url": f"{home}/me/cells"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [self.upload_mode(name) for name in names]})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [
                    item | {"actions": {"upload": {"href": f"{home}/store/{item['oid']}"}}}
                    for item in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif path.endswith("/commit/main"):
                self.answer({"commitUrl": f"{home}/me/cells/commit/1", "commitOid": "1" * 40})
            else:
                self.answer(status=404)

        def upload_mode(self, name: str) -> dict:
            mode = "lfs" if name.endswith("safetensors") else "regular"
            return {"path": name, "uploadMode": mode, "shouldIgnore": False}

        def do_PUT(self):
            stored[self.path.rsplit("/", 1)[1]] = self.body()
            self.answer()

        def do_GET(self):
            self.answer(status=404)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield SimpleNamespace(url=url, requests=requests, stored=stored)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_model_is_pushed(run, hub, bloodcell, tmp_path):
    """To a stand-in: that the right files go where the Hub's client sends them, by Git LFS
    (not Xet), and no other; what the real Hub answers is not tested."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("not to be uploaded")
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_stand_in",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = bloodcell("export", run.path, "--out", "out", "--push-to-hub", "me/cells", env=env)
    assert done.returncode == 0, done.stderr
    assert f"Uploaded: {hub.url}/me/cells" in done.stdout
    paths = [path for path, _, _ in hub.requests]
    assert paths[0] == "/api/repos/create"
    assert json.loads(hub.requests[0][1])["name"] == "cells"
    assert {token for _, _, token in hub.requests} == {"Bearer hf_stand_in"}
    (commit,) = [body for path, body, _ in hub.requests if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert sent == {n: (tmp_path / "out" / n).read_bytes() for n in ("README.md", "config.json")}
    assert b'"hf-hub:me/cells"' in sent["README.md"]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (large,) = [line["value"] for line in lines if line["key"] == "lfsFile"]
    assert (large["path"], large["oid"]) == (
        "model.safetensors",
        hashlib.sha256(weights).hexdigest(),
    )
    assert hub.stored == {large["oid"]: weights}


def test_a_push_that_cannot_be(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_module, "get_token", lambda: None)
    with pytest.raises(BloodcellError, match=r"no Hugging Face token.*\n.*hf auth login"):
        export_run(run, "timm", tmp_path / "out", "me/cells")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hub_module, "get_token", lambda: "hf_stand_in")
    for format, name in (("onnx", "me/cells"), ("timm", "cells"), ("timm", "me/bad name")):
        with pytest.raises(BloodcellError, match="`push_to_hub`") as refused:
            export_run(run, format, tmp_path / "out", name)
        assert refused.value.exit_code == 2
    with pytest.raises(
        BloodcellError, match="The Hugging Face Hub did not take me/cells"
    ) as refused:
        export_run(run, "timm", tmp_path / "out", "me/cells")
    assert "hf auth whoami" in refused.value.hint
    assert (tmp_path / "out" / "model.safetensors").is_file()
