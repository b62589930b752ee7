// Package config reads the server's configuration: one TOML file and the
// environment, which wins.
//
// It is strict. A key that it does not know is an error, in the file and in
// the environment, because a misspelt setting that is silently ignored is a
// setting that is not in force. Secrets are never values of the configuration:
// it names files, and a file that others than its owner may read is refused
// with [auth.ErrSecretExposed].
//
// docs/operations/configuration.md lists every setting; [File] is its source.
package config
