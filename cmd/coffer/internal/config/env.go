package config

import (
	"fmt"
	"strings"
)

// EnvPrefix begins the name of every setting in the environment. The names are
// the file's keys in capitals: COFFER_SERVER_DATA_DIR, COFFER_SERVER_LOG_LEVEL,
// COFFER_SERVER_REGION_EU_NATS_URL.
const EnvPrefix = "COFFER_SERVER_"

// overlay applies the environment's settings over the file's. Limits and plans
// are the file's alone.
func (f *File) overlay(environ []string) error {
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		key, ok := strings.CutPrefix(name, EnvPrefix)
		if !ok {
			continue
		}
		target := f.setting(key)
		if target == nil {
			return fmt.Errorf("%w: unknown variable %s", ErrInvalid, name)
		}
		*target = value
	}
	return nil
}

func (f *File) setting(key string) *string {
	switch key {
	case "DATA_DIR":
		return &f.DataDir
	case "OPERATOR_TOKEN_FILE":
		return &f.OperatorTokenFile
	case "OPERATORS_FILE":
		return &f.OperatorsFile
	case "LOG_LEVEL":
		return &f.Log.Level
	case "LOG_FORMAT":
		return &f.Log.Format
	}
	rest, ok := strings.CutPrefix(key, "REGION_")
	if !ok {
		return nil
	}
	id, field, ok := strings.Cut(rest, "_")
	if !ok || id == "" {
		return nil
	}
	return f.region(strings.ToLower(id)).setting(field)
}

// region finds a region of the file or adds one, so that a container can be
// configured by its environment alone.
func (f *File) region(id string) *Region {
	for i := range f.Regions {
		if f.Regions[i].ID == id {
			return &f.Regions[i]
		}
	}
	f.Regions = append(f.Regions, Region{ID: id})
	return &f.Regions[len(f.Regions)-1]
}

func (r *Region) setting(field string) *string {
	switch field {
	case "LISTEN":
		return &r.Listen
	case "URL":
		return &r.URL
	case "KMS":
		return &r.KMS
	case "TLS_CERT_FILE":
		return &r.TLS.CertFile
	case "TLS_KEY_FILE":
		return &r.TLS.KeyFile
	case "NATS_URL":
		return &r.NATS.URL
	case "NATS_CREDENTIALS_FILE":
		return &r.NATS.CredentialsFile
	case "NATS_USER_FILE":
		return &r.NATS.UserFile
	case "NATS_CA_FILE":
		return &r.NATS.CAFile
	}
	return nil
}
