package awskms

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/arn"

	"github.com/cofferdb/coffer/kms"
)

// ParseURL reads a provider setting:
//
//	awskms:///KEY?region=REGION&…
//
// KEY is an ARN, the id of a key, or alias/NAME. The parameters are region (not
// needed with an ARN), endpoint, profile, timeout (such as 5s), attempts and
// concurrency. Unknown and repeated ones are refused. Credentials come from the
// SDK's default chain only.
func ParseURL(setting string) (Options, error) {
	u, err := url.Parse(setting)
	if err != nil || u.Scheme != "awskms" {
		return Options{}, invalid("the setting is not a URL of scheme awskms")
	}
	if u.Host != "" || u.User != nil || u.Fragment != "" || u.Opaque != "" {
		return Options{}, invalid("the setting is not awskms:///KEY: three slashes, no user, no fragment")
	}
	o := Options{Key: strings.TrimPrefix(u.Path, "/")}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Options{}, invalid("the parameters are malformed")
	}
	set := o.parameters()
	for name, values := range query {
		switch {
		case set[name] == nil:
			return Options{}, invalid(fmt.Sprintf("unknown parameter %q", name))
		case len(values) != 1 || values[0] == "":
			return Options{}, invalid("parameter " + name + " needs one value")
		}
		if err := set[name](values[0]); err != nil {
			return Options{}, invalid("parameter " + name + " cannot be read")
		}
	}
	if _, err := o.check(); err != nil {
		return Options{}, err
	}
	return o, nil
}

// parameters is what the parameters of a URL set.
func (o *Options) parameters() map[string]func(string) error {
	text := func(to *string) func(string) error {
		return func(v string) error { *to = v; return nil }
	}
	number := func(to *int) func(string) error {
		return func(v string) (err error) { *to, err = strconv.Atoi(v); return err }
	}
	return map[string]func(string) error{
		"region": text(&o.Region), "endpoint": text(&o.Endpoint), "profile": text(&o.Profile),
		"attempts": number(&o.Attempts), "concurrency": number(&o.Concurrency),
		"timeout": func(v string) (err error) { o.Timeout, err = time.ParseDuration(v); return err },
	}
}

var (
	regionName = regexp.MustCompile(`^[a-z]{2,8}(-[a-z]{1,16}){1,3}-[0-9]{1,2}$`)
	keyID      = regexp.MustCompile(`^(mrk-[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$`)
	aliasName  = regexp.MustCompile(`^alias/[a-zA-Z0-9/_-]{1,250}$`)
	account    = regexp.MustCompile(`^[0-9]{12}$`)
)

// place is where the key has to be.
type place struct{ region, partition string }

// partitionOf is the partition of a region: they have separate accounts and
// endpoints, and their ARNs differ.
func partitionOf(region string) string {
	for prefix, partition := range map[string]string{
		"cn-": "aws-cn", "us-gov-": "aws-us-gov", "us-iso-": "aws-iso", "us-isob-": "aws-iso-b",
		"us-isof-": "aws-iso-f", "eu-isoe-": "aws-iso-e", "eusc-": "aws-eusc",
	} {
		if strings.HasPrefix(region, prefix) {
			return partition
		}
	}
	return "aws"
}

// refuse says what is wrong with the ARN of a key, or nothing.
func (p place) refuse(text string) string {
	a, err := arn.Parse(text)
	kind, id, _ := strings.Cut(a.Resource, "/")
	switch {
	case err != nil || a.Service != "kms" || kind != "key" || !keyID.MatchString(id) || !account.MatchString(a.AccountID):
		return "not the ARN of a key of KMS"
	case a.Region != p.region:
		return "the key is in another region"
	case a.Partition != p.partition:
		return "the key is in another partition"
	case strings.HasPrefix(id, "mrk-"):
		return "a multi-region key"
	default:
		return ""
	}
}

// check refuses what could not work and what would not stay in its region.
func (o *Options) check() (place, error) {
	region, wrong := o.Region, ""
	switch a, err := arn.Parse(o.Key); {
	case err == nil:
		if region == "" {
			region = a.Region
		}
		where := place{region: region, partition: partitionOf(region)}
		if name, ok := strings.CutPrefix(a.Resource, "alias/"); ok {
			// An alias is of one region too; its key is checked when it is known.
			if !aliasName.MatchString("alias/" + name) {
				return place{}, invalid("not the ARN of an alias")
			}
			a.Resource = "key/00000000-0000-0000-0000-000000000000"
		}
		wrong = where.refuse(a.String())
	case aliasName.MatchString(o.Key):
	case keyID.MatchString(o.Key):
		if strings.HasPrefix(o.Key, "mrk-") {
			wrong = "a multi-region key"
		}
	default:
		return place{}, invalid("the key is not an ARN, the id of a key, or alias/NAME")
	}
	if !regionName.MatchString(region) {
		return place{}, invalid("the region is missing or malformed")
	}
	if wrong != "" {
		return place{}, &kms.Error{Op: "open", Provider: Name, Key: o.Key, Class: kms.ErrMismatch, Detail: wrong}
	}
	if strings.Contains(o.Key, "alias/aws/") {
		return place{}, invalid("keys that AWS manages cannot be used")
	}
	if o.Timeout < 0 || o.Attempts < 0 || o.Attempts > 100 || o.Concurrency < 0 || o.Concurrency > 1000 {
		return place{}, invalid("timeout, attempts or concurrency are out of range")
	}
	return place{region: region, partition: partitionOf(region)}, o.checkEndpoint()
}

func (o *Options) checkEndpoint() error {
	if o.Endpoint == "" {
		return nil
	}
	u, err := url.Parse(o.Endpoint)
	switch {
	case err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return invalid("the endpoint is not https://HOST[:PORT]")
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return invalid("plain HTTP is only for loopback addresses")
	case u.Scheme != "http" && u.Scheme != "https":
		return invalid("the endpoint is not https://HOST[:PORT]")
	}
	return nil
}

func isLoopback(host string) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.IsLoopback()
	}
	return host == "localhost"
}

func invalid(text string) error {
	return fmt.Errorf("awskms: reading the settings: %w", errors.New(text))
}
