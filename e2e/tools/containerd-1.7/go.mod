// The callers of containerd 1.7: its go-cni and libcni, which know CNI up to 1.0.0 and no `cniVersions`.
module plat.network/e2e/tools/containerd-1.7

go 1.26.0

require github.com/containerd/go-cni v1.1.9

require github.com/containernetworking/cni v1.1.2 // indirect
