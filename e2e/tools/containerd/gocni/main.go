// gocni calls a CNI network as containerd does: by go-cni, with the options of containerd's CRI plugin in their
// order. It is built twice: with the go-cni of the containerd of these tests (the go.mod above this folder),
// and with that of containerd 1.7 (../../containerd-1.7).
//
//	NETCONFPATH=/etc/cni/net.d CNI_PATH=/opt/cni/bin gocni status
//	... gocni setup ID NETNS   <pod.json    prints what containerd takes from the result
//	... gocni remove ID NETNS  <pod.json    NETNS may be empty, as of a sandbox that is gone
//
// pod.json holds the parts of the CRI's PodSandboxConfig that reach CNI. Their keys go on to the plugins by
// go-cni's own types, so with Go's capital letters.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/containerd/go-cni"
)

// pod is what containerd knows of a sandbox.
type pod struct {
	Labels       map[string]string
	Annotations  map[string]string
	PortMappings []cni.PortMapping
	Bandwidth    *cni.BandWidth
	DNS          *cni.DNS
	CgroupParent string
}

// options are those of cniNamespaceOpts (containerd, internal/cri/server/sandbox_run.go).
func (p pod) options(id string) []cni.NamespaceOpts {
	labels := map[string]string{"K8S_POD_INFRA_CONTAINER_ID": id, "IgnoreUnknown": "1"}
	for key, value := range p.Labels {
		labels[key] = value
	}
	options := []cni.NamespaceOpts{
		cni.WithLabels(labels),
		cni.WithCapability("io.kubernetes.cri.pod-annotations", p.Annotations),
	}
	if len(p.PortMappings) > 0 {
		options = append(options, cni.WithCapabilityPortMap(p.PortMappings))
	}
	if p.Bandwidth != nil {
		options = append(options, cni.WithCapabilityBandWidth(*p.Bandwidth))
	}
	if p.DNS != nil {
		options = append(options, cni.WithCapabilityDNS(*p.DNS))
	}
	if p.CgroupParent != "" {
		options = append(options, cni.WithCapabilityCgroupPath(p.CgroupParent))
	}
	return options
}

func run(arguments []string) error {
	network, err := cni.New(
		cni.WithMinNetworkCount(1),
		cni.WithPluginConfDir(os.Getenv("NETCONFPATH")),
		cni.WithPluginMaxConfNum(1),
		cni.WithPluginDir([]string{os.Getenv("CNI_PATH")}))
	if err != nil {
		return err
	}
	// As with use_internal_loopback = true: without the loopback plugin beside the pod's network.
	if err := network.Load(cni.WithDefaultConf); err != nil {
		return err
	}
	if len(arguments) == 1 && arguments[0] == "status" {
		return network.Status()
	}
	if len(arguments) != 3 {
		return fmt.Errorf("usage: gocni status | setup ID NETNS | remove ID NETNS")
	}
	var config pod
	if err := json.NewDecoder(os.Stdin).Decode(&config); err != nil {
		return fmt.Errorf("pod on standard input: %w", err)
	}
	id, netns := arguments[1], arguments[2]
	switch arguments[0] {
	case "setup":
		result, err := network.Setup(context.Background(), id, netns, config.options(id)...)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(result)
	case "remove":
		return network.Remove(context.Background(), id, netns, config.options(id)...)
	}
	return fmt.Errorf("unknown verb %s", arguments[0])
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gocni:", err)
		os.Exit(1)
	}
}
