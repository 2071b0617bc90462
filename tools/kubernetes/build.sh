#!/usr/bin/env bash
# Build kube-apiserver and kube-controller-manager 1.20 from Debian's source package, for tests/autoscale_live/test_kubernetes.py.
# Needs Debian 12, root, 3 GB and some ten minutes of a core. Usage: tools/kubernetes/build.sh FOLDER
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
apt-get install -y -q etcd-server golang-1.19-go golang-github-modern-go-reflect2-dev dpkg-dev
mkdir -p "$folder/lists/partial" "$folder/parts" "$folder/source" "$folder/go/src/k8s.io"
# This machine's own package sources, for sources, without changing its settings.
sed 's/^Types: deb$/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > "$folder/parts/debian.sources"
apt=(apt-get -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$folder/parts" -o "Dir::State::lists=$folder/lists")
"${apt[@]}" update -q
tree="$folder/go/src/k8s.io/kubernetes"
if [ ! -d "$tree" ]; then
  (cd "$folder/source" && "${apt[@]}" source -q --download-only kubernetes && tar xzf kubernetes_*.orig.tar.gz)
  mv "$folder"/source/kubernetes-*/ "$tree"
  # The copy of reflect2 in there crashes with Go 1.18 and later; Debian's own does not.
  rm -rf "$tree/vendor/github.com/modern-go/reflect2"
  cp -r /usr/share/gocode/src/github.com/modern-go/reflect2 "$tree/vendor/github.com/modern-go/reflect2"
fi
cd "$tree"
export GO111MODULE=off CGO_ENABLED=0 GOPATH="$folder/go" GOCACHE="$folder/cache"
go=/usr/lib/go-1.19/bin/go
if [ ! -e pkg/generated/openapi/zz_generated.openapi.go ]; then
  $go build -o "$folder/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
  marked=$(grep -rl --include='*.go' --exclude='*_test.go' '+k8s:openapi-gen=' staging/src/k8s.io/{api,apimachinery,apiserver,apiextensions-apiserver,kube-aggregator,component-base,kube-controller-manager,kube-scheduler,kube-proxy,kubelet,cloud-provider} pkg/apis pkg/controller |
    xargs -n1 dirname | sort -u | sed 's#^staging/src/#k8s.io/kubernetes/vendor/#; s#^pkg#k8s.io/kubernetes/pkg#' | paste -sd,)
  "$folder/openapi-gen" -O zz_generated.openapi --go-header-file hack/boilerplate/boilerplate.generatego.txt \
    --output-base "$folder/go/src" --output-package k8s.io/kubernetes/pkg/generated/openapi -r "$folder/violations" -i "$marked"
fi
for program in kube-apiserver kube-controller-manager; do
  $go build -ldflags '-s -w' -o "$folder/$program" "./cmd/$program"
done
echo "BLOCK_KUBERNETES=$folder pytest tests/autoscale_live/test_kubernetes.py"
