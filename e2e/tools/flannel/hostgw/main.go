// hostgw is flannel's daemon with its kube subnet manager and its host-gw backend alone, called as its own
// main does. Without the other backends, one of which needs a module that the proxy does not hand out, and
// without masquerade: only routes are compared.
package main

import (
	"context"
	"flag"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "kubeconfig file")
	config := flag.String("net-config-path", "", "net-conf.json")
	device := flag.String("iface", "eth0", "link that carries the node's address")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// NODE_NAME says which node this is.
	manager, err := kube.NewSubnetManager(ctx, "", *kubeconfig, "flannel.alpha.coreos.com", *config, false)
	must(err)
	network, err := manager.GetNetworkConfig(ctx)
	must(err)
	stack, err := ipmatch.GetIPFamily(network.EnableIPv4, network.EnableIPv6)
	must(err)
	link, err := ipmatch.LookupExtIface(*device, "", "", stack, ipmatch.PublicIPOpts{})
	must(err)
	hostgw, err := backend.NewManager(ctx, manager, link).GetBackend(network.BackendType)
	must(err)
	var running sync.WaitGroup
	routes, err := hostgw.RegisterNetwork(ctx, &running, network)
	must(err)
	must(manager.CompleteLease(ctx, routes.Lease(), &running))
	routes.Run(ctx)
	running.Wait()
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
