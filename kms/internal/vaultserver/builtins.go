package main

import (
	"context"
	_ "unsafe" // for go:linkname

	kubeauth "github.com/hashicorp/vault-plugin-auth-kubernetes"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/vault"
)

// What this server can mount. Vault's own list (helper/builtinplugins) would
// bring every database driver and cloud client along.
var (
	secretEngines = map[string]logical.Factory{"transit": newTransit, "kv": vault.PassthroughBackendFactory}
	authMethods   = map[string]logical.Factory{"approle": approle.Factory, "kubernetes": newKubernetes}
)

// builtins answers the core's question which plugins are compiled in.
type builtins struct{}

func (builtins) of(t consts.PluginType) map[string]logical.Factory {
	switch t {
	case consts.PluginTypeSecrets:
		return secretEngines
	case consts.PluginTypeCredential:
		return authMethods
	default:
		return nil
	}
}

func (b builtins) Contains(name string, t consts.PluginType) bool {
	_, ok := b.of(t)[name]
	return ok
}

func (b builtins) Get(name string, t consts.PluginType) (func() (any, error), bool) {
	f, ok := b.of(t)[name]
	return func() (any, error) { return f, nil }, ok
}

func (b builtins) Keys(t consts.PluginType) []string {
	var names []string
	for name := range b.of(t) {
		names = append(names, name)
	}
	return names
}

func (b builtins) DeprecationStatus(name string, t consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, b.Contains(name, t)
}

func (builtins) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }

// Vault 1.14.2 was released against the sdk in its own tree. The published sdk
// v0.9.2 has one check more: it panics on a path with a create operation and
// no existence check. withExistence gives such paths a check that answers
// "exists", so that requests stay updates, as they are in the released Vault.
func withExistence(paths []*framework.Path) []*framework.Path {
	exists := func(context.Context, *logical.Request, *framework.FieldData) (bool, error) { return true, nil }
	for _, p := range paths {
		_, operation := p.Operations[logical.CreateOperation]
		_, callback := p.Callbacks[logical.CreateOperation]
		if p.ExistenceCheck == nil && (operation || callback) {
			p.ExistenceCheck = exists
		}
	}
	return paths
}

// The paths under sys/ that stand for enterprise features have the same flaw
// and are only reachable through this unexported variable of the core.
//
//go:linkname entPaths github.com/hashicorp/vault/vault.entPaths
var entPaths func(*vault.SystemBackend) []*framework.Path

func init() {
	released := entPaths
	entPaths = func(b *vault.SystemBackend) []*framework.Path { return withExistence(released(b)) }
}

func newTransit(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b, err := transit.Backend(ctx, conf)
	if err != nil {
		return nil, err
	}
	withExistence(b.Backend.Paths)
	return b, b.Setup(ctx, conf)
}

func newKubernetes(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	return kubeauth.Factory(ctx, conf)
}
