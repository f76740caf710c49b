#!/usr/bin/env bash
# The layers of the image hold no credential: the Dockerfile is built with canaries wherever one could come from (pip's
# secret, the builder's environment, files of the context that are none of the image's), and every layer and the image's
# settings are searched for them. With a lock of two small packages, so that it takes a minute. Needs buildah.
# usage: tests/cluster/image.sh FOLDER [BASE]   (BASE: debian:bookworm-slim, or an image that is here already;
# BUILD_FLAGS: more words for buildah)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1
base=${2:-debian:bookworm-slim}
canary=canary$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
mkdir -p "$folder/context"
git -C "$root" ls-files -z | tar --create --null --directory "$root" --files-from - | tar --extract --directory "$folder/context"
cd "$folder/context"
grep -E '^(setuptools|packaging)==' "$root/requirements.lock" >requirements.lock
: >requirements-dev.lock
for path in .env conf/.env runs/default/cell.log .git/config secrets.yaml lyapft/__pycache__/x.pyc; do
  mkdir -p "$(dirname "$path")"
  echo "$canary" >"$path"
done
{ cat "${PIP_CONF:-/dev/null}"; echo; echo "# $canary"; } >"$folder/pip.conf"
export WANDB_API_KEY=$canary HF_TOKEN=hf_$canary
# shellcheck disable=SC2086 # several words
buildah build --isolation chroot --format docker --no-cache ${BUILD_FLAGS:-} --build-arg "BASE=$base" \
  --secret "id=pip,src=$folder/pip.conf" --target test --file docker/Dockerfile --tag lyapft:canary . >"$folder/build.log" 2>&1
buildah push lyapft:canary "oci:$folder/image" >>"$folder/build.log" 2>&1
python3 - "$folder/image" "$canary" <<'PY'
import sys, tarfile
from pathlib import Path

image, canary = Path(sys.argv[1]), sys.argv[2].encode()
files = layers = 0
seen = set()
for blob in (image / "blobs" / "sha256").iterdir():
    content = blob.read_bytes()
    if content[:1] == b"{":
        assert canary not in content, f"in the image's settings: {blob.name}"
        continue
    with tarfile.open(blob) as layer:
        layers += 1
        for entry in layer:
            files += 1
            seen.add(entry.name)
            assert canary.decode() not in entry.name, entry.name
            if entry.isfile():
                assert canary not in layer.extractfile(entry).read(), entry.name
assert {"opt/lyapft/train.py", "opt/lyapft/tests/test_secrets.py"} <= seen, "these are not the image's layers"
print(f"{layers} layers, {files} files: none holds a credential")
PY
buildah inspect --type image lyapft:canary | python3 -c '
import json, sys
config = json.load(sys.stdin)["Docker"]["config"]
assert config["User"] not in ("", "root", "0"), config["User"]
assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "lyapft.doctor"], config["Healthcheck"]
print("user:", config["User"], "- health check:", *config["Healthcheck"]["Test"][1:])'
buildah rmi lyapft:canary >/dev/null
