// Package repo holds no code: its tests are the repository's own rules, so that
// a change which breaks one fails `go test ./...` and not a reviewer's patience.
//
// They check the import line of docs/design.md, what may stand in the tree, and
// that documents point at things which exist. They read the tree and import nothing
// of it, so they also speak while it does not compile. Package compose beside this
// one is for docker-compose.yml. A rule that has to give way is changed here, with
// the reason beside it.
package repo
