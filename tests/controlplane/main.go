// controlplane is a Kubernetes control plane in one program, for tests: the first argument says which component to be.
//
// Every component is upstream's own command, compiled from its Go module: nothing is simulated. Deliberately absent: the
// kubelet and the scheduler (no test here runs pods through Kubernetes), and any orchestration of the components, which
// belongs to tests/support/control_plane.rs.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"sort"
	"strings"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // the API client's metrics, as in upstream's mains
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectlcmd "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kubeproxy "k8s.io/kubernetes/cmd/kube-proxy/app"
)

// components maps the first argument to what runs; each reads os.Args, already shifted by one.
var components = map[string]func() error{
	"etcd": func() error {
		etcdmain.Main(os.Args)
		return nil
	},
	"kube-apiserver":          func() error { return exit(cli.Run(apiserver.NewAPIServerCommand())) },
	"kube-controller-manager": func() error { return exit(cli.Run(controllermanager.NewControllerManagerCommand())) },
	"kube-proxy":              func() error { return exit(cli.Run(kubeproxy.NewProxyCommand())) },
	"kubectl": func() error {
		if err := cli.RunNoErrOutput(kubectlcmd.NewDefaultKubectlCommand()); err != nil {
			kubectlutil.CheckErr(err) // prints as kubectl does, and exits
		}
		return nil
	},
	"genkey": genkey,
}

func main() {
	names := make([]string, 0, len(components))
	for name := range components {
		names = append(names, name)
	}
	sort.Strings(names)
	usage := fmt.Sprintf("usage: controlplane <%s> [arguments]", strings.Join(names, "|"))
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	run, known := components[os.Args[1]]
	if !known {
		fmt.Fprintf(os.Stderr, "controlplane: unknown component %q\n%s\n", os.Args[1], usage)
		os.Exit(2)
	}
	os.Args = os.Args[1:]
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "controlplane %s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
}

// exit passes on a component's own exit code; it has printed its error already.
func exit(code int) error {
	os.Exit(code)
	return nil
}

// genkey writes a new P-256 private key as PEM to the path in its only argument: the key that signs service account
// tokens, which the API server demands and does not make for itself.
func genkey() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("want exactly one argument, the file to write")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(os.Args[1], pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}
