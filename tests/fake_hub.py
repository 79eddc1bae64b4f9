"""A model hub on loopback, as far as huggingface_hub's client needs one to upload and download."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What was asked and what is there."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> path -> content."""


@contextmanager
def fake_hub():
    """A running hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_any(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization"))
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                told = json.loads(content)
                name = "/".join(filter(None, (told.get("organization"), told["name"])))
                hub.repos.setdefault(name, {})
                return self.answer(200, {"url": f"{hub.url}/{name}", "id": name})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if "preupload" in parts:
                files = [
                    {**file, "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                    for file in json.loads(content)["files"]
                ]
                keep = ("path", "uploadMode")
                told = [{**{k: f[k] for k in keep}, "shouldIgnore": False, "oid": None} for f in files]
                return self.answer(200, {"files": told})
            if path.endswith("/info/lfs/objects/batch"):
                told = []
                for item in json.loads(content)["objects"]:
                    upload = {"href": f"{hub.url}/objects/{item['oid']}", "header": {}}
                    told.append({"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}})
                return self.answer(200, {"transfer": "basic", "objects": told})
            if parts[0] == "objects":
                hub.objects[parts[1]] = content
                return self.answer(200)
            if "commit" in parts:
                name = "/".join(parts[2:4])
                for line in map(json.loads, content.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.repos[name][value["path"]] = hub.objects[value["oid"]]
                return self.answer(
                    200, {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                )
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repos:
                name = "/".join(parts[2:4])
                files = hub.repos[name]
                if "tree" in parts:
                    tree = [{"type": "file", "path": p, "size": len(c), "oid": _digest(c)} for p, c in files.items()]
                    return self.answer(200, tree)
                siblings = [{"rfilename": p} for p in files]
                return self.answer(200, {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
            if "resolve" in parts and parts[-1] in hub.repos.get("/".join(parts[:2]), {}):
                found = hub.repos["/".join(parts[:2])][parts[-1]]
                return self.answer(200, found, ETag=f'"{_digest(found)}"', X_Repo_Commit=COMMIT)
            return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
