package vault

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Methods of authentication.
const (
	AuthToken      = "token"
	AuthAppRole    = "approle"
	AuthKubernetes = "kubernetes"
)

// ServiceAccountToken is where Kubernetes puts the token of a pod.
const ServiceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path

// Auth says how to log in. Every file is read anew for each login, so that
// what rotates it needs no restart.
type Auth struct {
	// Method is AuthToken, AuthAppRole or AuthKubernetes.
	Method string
	// Mount is the path of the auth method; empty is its name.
	Mount string
	// TokenFile holds a token: AuthToken. A file that Vault Agent keeps fresh
	// will do.
	TokenFile string
	// RoleID or RoleIDFile, and SecretIDFile: AuthAppRole.
	RoleID, RoleIDFile, SecretIDFile string
	// Role, and JWTFile if it is not ServiceAccountToken: AuthKubernetes.
	Role, JWTFile string
}

// TLS says whom to trust. Its zero value trusts the system's certificates.
type TLS struct {
	CAFile     string // PEM; instead of the system's
	ServerName string // expected in the certificate, if not the address's host
	// CertFile and KeyFile are the client's own certificate, read for each
	// connection.
	CertFile, KeyFile string
}

// ParseURL reads a provider setting:
//
//	vault+https://HOST[:PORT]/MOUNT/KEY?auth=METHOD&…
//
// The last part of the path is the key, the parts before it are the mount. The
// parameters are auth (token, approle, kubernetes), auth_mount, token_file,
// role_id, role_id_file, secret_id_file, role, jwt_file, namespace, host,
// ca_file, server_name, cert_file, key_file, trim (true), timeout (such as 5s)
// and attempts. Unknown and repeated ones are refused, and so are secrets
// themselves: settings are shown, files are not. vault+http is for loopback.
func ParseURL(setting string) (Options, error) {
	u, err := url.Parse(setting)
	if err != nil {
		return Options{}, invalid(errors.New("the setting is not a URL"))
	}
	if u.Scheme != "vault+https" && u.Scheme != "vault+http" {
		return Options{}, invalid(errors.New("the scheme is not vault+https"))
	}
	if u.User != nil || u.Fragment != "" {
		return Options{}, invalid(errors.New("user, password and fragment are not allowed"))
	}
	mount, key, ok := cutLast(strings.TrimPrefix(u.Path, "/"), "/")
	if !ok {
		return Options{}, invalid(errors.New("the path is not MOUNT/KEY"))
	}
	o := Options{
		Address: strings.TrimPrefix(u.Scheme, "vault+") + "://" + u.Host,
		Mount:   mount,
		Key:     key,
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Options{}, invalid(errors.New("the parameters are malformed"))
	}
	targets := o.parameters()
	for name, values := range query {
		set, known := targets[name]
		switch {
		case name == "token" || name == "secret_id" || name == "jwt":
			return Options{}, invalid(fmt.Errorf("%s is a secret: put it into a file and name that with %s_file", name, name))
		case !known:
			return Options{}, invalid(fmt.Errorf("unknown parameter %q", name))
		case len(values) != 1 || values[0] == "":
			return Options{}, invalid(fmt.Errorf("parameter %s needs one value", name))
		}
		if err := set(values[0]); err != nil {
			return Options{}, invalid(fmt.Errorf("parameter %s: %w", name, err))
		}
	}
	if _, err := o.check(); err != nil {
		return Options{}, invalid(err)
	}
	return o, nil
}

// parameters is what the parameters of a URL set.
func (o *Options) parameters() map[string]func(string) error {
	text := func(to *string) func(string) error {
		return func(v string) error { *to = v; return nil }
	}
	return map[string]func(string) error{
		"auth":           text(&o.Auth.Method),
		"auth_mount":     text(&o.Auth.Mount),
		"token_file":     text(&o.Auth.TokenFile),
		"role_id":        text(&o.Auth.RoleID),
		"role_id_file":   text(&o.Auth.RoleIDFile),
		"secret_id_file": text(&o.Auth.SecretIDFile),
		"role":           text(&o.Auth.Role),
		"jwt_file":       text(&o.Auth.JWTFile),
		"namespace":      text(&o.Namespace),
		"host":           text(&o.Host),
		"ca_file":        text(&o.TLS.CAFile),
		"server_name":    text(&o.TLS.ServerName),
		"cert_file":      text(&o.TLS.CertFile),
		"key_file":       text(&o.TLS.KeyFile),
		"trim": func(v string) (err error) {
			o.Trim, err = strconv.ParseBool(v)
			return plain(err, "not true or false")
		},
		"timeout": func(v string) (err error) {
			o.Timeout, err = time.ParseDuration(v)
			return plain(err, "not a duration such as 5s")
		},
		"attempts": func(v string) (err error) {
			o.Attempts, err = strconv.Atoi(v)
			return plain(err, "not a number")
		},
	}
}

func plain(err error, text string) error {
	if err != nil {
		return errors.New(text)
	}
	return nil
}

var (
	keyName   = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,128}$`)
	pathName  = regexp.MustCompile(`^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$`)
	dotted    = regexp.MustCompile(`(^|/)\.{1,2}(/|$)`)
	hostNames = regexp.MustCompile(`^[A-Za-z0-9_.:\[\]-]{1,255}$`)
)

func isPath(s string) bool { return len(s) <= 255 && pathName.MatchString(s) && !dotted.MatchString(s) }

// check refuses what could not work and what would not be safe.
func (o *Options) check() (*url.URL, error) {
	address, err := url.Parse(o.Address)
	if err != nil || address.Host == "" || !hostNames.MatchString(address.Host) || address.User != nil ||
		strings.Trim(address.Path, "/") != "" || address.RawQuery != "" || address.Fragment != "" {
		return nil, errors.New("the address is not https://HOST[:PORT]")
	}
	address.Path = ""
	switch {
	case address.Scheme == "http" && !isLoopback(address.Hostname()):
		return nil, errors.New("plain HTTP is only for loopback addresses")
	case address.Scheme != "https" && address.Scheme != "http":
		return nil, errors.New("the scheme of the address is not https")
	case !isPath(strings.Trim(o.Mount, "/")):
		return nil, errors.New("the mount is not a path of letters, digits, '_', '.' and '-'")
	case !keyName.MatchString(o.Key) || dotted.MatchString(o.Key):
		return nil, errors.New("the key is not a name of letters, digits, '_', '.' and '-'")
	case o.Namespace != "" && !isPath(strings.Trim(o.Namespace, "/")):
		return nil, errors.New("the namespace is not a path of letters, digits, '_', '.' and '-'")
	case o.Host != "" && !hostNames.MatchString(o.Host):
		return nil, errors.New("host is not a host")
	case o.Timeout < 0 || o.Attempts < 0 || o.Attempts > 100:
		return nil, errors.New("timeout or attempts are out of range")
	case (o.TLS.CertFile == "") != (o.TLS.KeyFile == ""):
		return nil, errors.New("a client certificate needs both cert_file and key_file")
	case address.Scheme == "http" && o.TLS != (TLS{}):
		return nil, errors.New("TLS settings for a plain HTTP address")
	}
	return address, o.Auth.check()
}

func (a Auth) check() error {
	if a.Mount != "" && !isPath(strings.Trim(a.Mount, "/")) {
		return errors.New("auth_mount is not a path of letters, digits, '_', '.' and '-'")
	}
	// What each method needs, and what it does not know.
	set := map[string]bool{
		"token_file": a.TokenFile != "", "role_id": a.RoleID != "" || a.RoleIDFile != "",
		"secret_id_file": a.SecretIDFile != "", "role": a.Role != "", "jwt_file": a.JWTFile != "",
	}
	var required, optional []string
	switch a.Method {
	case AuthToken:
		required = []string{"token_file"}
	case AuthAppRole:
		required = []string{"role_id", "secret_id_file"}
	case AuthKubernetes:
		required, optional = []string{"role"}, []string{"jwt_file"}
	default:
		return errors.New("auth is not token, approle or kubernetes")
	}
	if a.RoleID != "" && a.RoleIDFile != "" {
		return errors.New("both role_id and role_id_file are set")
	}
	for _, name := range required {
		if !set[name] {
			return fmt.Errorf("auth %s needs %s", a.Method, name)
		}
	}
	for name, is := range set {
		if is && !slices.Contains(required, name) && !slices.Contains(optional, name) {
			return fmt.Errorf("auth %s does not use %s", a.Method, name)
		}
	}
	return nil
}

func isLoopback(host string) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.IsLoopback()
	}
	return host == "localhost"
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+len(sep):], true
}

func invalid(err error) error { return fmt.Errorf("vault: reading the settings: %w", err) }

func inputError(op, detail string) error {
	return fmt.Errorf("vault: %s: %w: %s", op, kms.ErrInput, detail)
}
