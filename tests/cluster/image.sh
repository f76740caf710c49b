#!/usr/bin/env bash
# The layers of the image hold no credential: the Dockerfile is built with canaries wherever one could come from (pip's
# secret, the builder's environment, files of the context that are none of the image's), and every layer and the image's
# settings are searched for them. Then the same search has to find what a second image was given on purpose: a variable,
# and a file that a later layer took away. With a lock of two small packages, so that it takes a minute. Needs buildah.
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

build() { # the image of this tag, a layer for each instruction as Docker has it, and a copy of them in a folder
  local tag=$1
  shift
  # shellcheck disable=SC2086 # several words
  buildah build --isolation chroot --format docker --layers --no-cache ${BUILD_FLAGS:-} --build-arg "BASE=$base" \
    --secret "id=pip,src=$folder/pip.conf" --tag "lyapft:$tag" "$@" . >"$folder/$tag.log" 2>&1 ||
    { tail -20 "$folder/$tag.log" >&2; exit 1; }
  buildah push "lyapft:$tag" "oci:$folder/$tag" >>"$folder/$tag.log" 2>&1
}
search() { # of those layers: where the canary is, a line each
  python3 - "$folder/$1" "$canary" <<'PY'
import sys, tarfile
from pathlib import Path

image, canary = Path(sys.argv[1]), sys.argv[2].encode()
files = layers = 0
seen = set()
for blob in (image / "blobs" / "sha256").iterdir():
    content = blob.read_bytes()
    if content[:1] == b"{":
        if canary in content:
            print("settings", blob.name[:12])
        continue
    with tarfile.open(blob) as layer:
        layers += 1
        for entry in layer:
            files += 1
            seen.add(entry.name)
            if canary.decode() in entry.name or (entry.isfile() and canary in layer.extractfile(entry).read()):
                print("layer", blob.name[:12], entry.name)
assert {"opt/lyapft/train.py", "opt/lyapft/tests/test_secrets.py"} <= seen, "these are not the image's layers"
print(f"{layers} layers, {files} files searched", file=sys.stderr)
PY
}

build canary --target test --file docker/Dockerfile
found=$(search canary)
if [[ -n $found ]]; then echo "a credential is in the image: $found" >&2; exit 1; fi
echo "none holds a credential"
cat >"$folder/planted.Dockerfile" <<DOCKER
FROM lyapft:canary
USER root
ENV PLANTED=$canary
RUN --mount=type=secret,id=pip,target=/etc/pip.conf cp /etc/pip.conf /opt/planted
RUN rm /opt/planted
DOCKER
build planted --file "$folder/planted.Dockerfile"
found=$(search planted)
grep -q '^settings' <<<"$found" || { echo "the search misses a variable of the image" >&2; exit 1; }
grep -q '^layer .* opt/planted$' <<<"$found" || { echo "the search misses a file of an inner layer" >&2; exit 1; }
echo "and the search found those that were put there:" "$found"
buildah inspect --type image lyapft:canary | python3 -c '
import json, sys
config = json.load(sys.stdin)["Docker"]["config"]
assert config["User"] not in ("", "root", "0"), config["User"]
assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "lyapft.doctor"], config["Healthcheck"]
print("user:", config["User"], "- health check:", *config["Healthcheck"]["Test"][1:])'
buildah rmi lyapft:planted lyapft:canary >/dev/null
