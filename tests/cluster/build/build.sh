#!/usr/bin/env bash
# Builds the binaries of the Kubernetes that tests/cluster starts: tests/cluster/build/build.sh /somewhere/kubernetes
# Needs Go 1.26 or later, a Go module proxy and about 8 minutes on 2 cores. Set GOARCH for another architecture.
set -euo pipefail
out=$(mkdir -p "${1:?a folder for the binaries}" && cd "$1" && pwd)
cd "$(dirname "$0")"
export CGO_ENABLED=0
flags="-s -w"
version=k8s.io/component-base/version
release="-X $version.gitVersion=v1.34.4 -X $version.gitMajor=1 -X $version.gitMinor=34"

(cd kubernetes && go build -trimpath -ldflags "$flags $release" -o "$out/kubernetes" .)
(cd etcd && go build -trimpath -ldflags "$flags" -o "$out/etcd" go.etcd.io/etcd/server/v3)
(cd coredns && go build -trimpath -ldflags "$flags" -o "$out/coredns" github.com/coredns/coredns)
(cd pause && go build -trimpath -ldflags "$flags" -o "$out/pause" .)
(cd jobset && go build -trimpath -ldflags "$flags" -o "$out/jobset" sigs.k8s.io/jobset)
(cd kueue && go build -trimpath -ldflags "$flags" -o "$out/kueue" sigs.k8s.io/kueue/cmd/kueue)

# The CRDs and webhook configurations of the operators, from the same modules.
for name in jobset kueue; do
  module=$(cd "$name" && go list -m -f '{{.Dir}}' "sigs.k8s.io/$name")
  mkdir -p "$out/$name"
  awk 'FNR == 1 && !/^---/ {print "---"} 1' "$module"/config/components/crd/bases/*.yaml > "$out/$name/crd.yaml"
  cp "$module/config/components/webhook/manifests.yaml" "$out/$name/webhooks.yaml"
done
