package awskms_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cofferdb/coffer/kms/awskms"
)

func TestParseURL(t *testing.T) {
	const arn = "arn:aws:kms:eu-west-2:111122223333:key/01234567-89ab-cdef-0123-456789abcdef"
	for setting, want := range map[string]awskms.Options{
		"awskms:///alias/coffer-eu?region=eu-west-2": {Key: "alias/coffer-eu", Region: "eu-west-2"},
		"awskms:///" + arn:                           {Key: arn},
		"awskms:///" + arn + "?region=eu-west-2&endpoint=http://127.0.0.1:4566&profile=p&timeout=2s&attempts=3&concurrency=8": {
			Key: arn, Region: "eu-west-2", Endpoint: "http://127.0.0.1:4566", Profile: "p", Timeout: 2 * time.Second, Attempts: 3, Concurrency: 8,
		},
		"awskms:///arn:aws-cn:kms:cn-north-1:111122223333:alias/coffer":          {Key: "arn:aws-cn:kms:cn-north-1:111122223333:alias/coffer"},
		"awskms:///01234567-89ab-cdef-0123-456789abcdef?region=ap-southeast-1":   {Key: "01234567-89ab-cdef-0123-456789abcdef", Region: "ap-southeast-1"},
		"awskms:///alias/x?region=us-gov-west-1&endpoint=https://vpce.test:8443": {Key: "alias/x", Region: "us-gov-west-1", Endpoint: "https://vpce.test:8443"},
	} {
		got, err := awskms.ParseURL(setting)
		if err != nil {
			t.Errorf("%s: %v", setting, err)
			continue
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			t.Errorf("%s:\n got %+v\nwant %+v", setting, got, want)
		}
	}
	for setting, why := range map[string]string{
		"awskms://alias/coffer-eu?region=eu-west-2":                          "three slashes",
		"awskms://user:pw@/alias/coffer-eu?region=eu-west-2":                 "three slashes",
		"aws:///alias/coffer-eu?region=eu-west-2":                            "scheme",
		"awskms:///alias/coffer-eu":                                          "region",
		"awskms:///alias/coffer-eu?region=":                                  "one value",
		"awskms:///alias/coffer-eu?region=eu-west-2&region=eu-west-1":        "one value",
		"awskms:///alias/coffer-eu?region=Europe":                            "region",
		"awskms:///alias/coffer-eu?region=eu-west-2.evil.example":            "region",
		"awskms:///alias/aws/s3?region=eu-west-2":                            "AWS manages",
		"awskms:///alias/a%20b?region=eu-west-2":                             "key",
		"awskms:///?region=eu-west-2":                                        "key",
		"awskms:///coffer?region=eu-west-2":                                  "key",
		"awskms:///" + arn + "?region=eu-central-1":                          "another region",
		"awskms:///" + arn + "&region=eu-west-2":                             "not the ARN",
		"awskms:///alias/x?region=eu-west-2&endpoint=http://kms.example":     "loopback",
		"awskms:///alias/x?region=eu-west-2&endpoint=ftp://127.0.0.1":        "endpoint",
		"awskms:///alias/x?region=eu-west-2&endpoint=https://u:p@127.0.0.1":  "endpoint",
		"awskms:///alias/x?region=eu-west-2&access_key_id=AKID":              "unknown",
		"awskms:///alias/x?region=eu-west-2&attempts=many":                   "attempts",
		"awskms:///alias/x?region=eu-west-2&attempts=1000":                   "range",
		"awskms:///alias/x?region=eu-west-2&timeout=soon":                    "timeout",
		"awskms:///alias/x?region=eu-west-2&concurrency=-1":                  "range",
		"awskms:///alias/x?region=eu-west-2#there":                           "fragment",
		"awskms:///alias/x?%zz":                                              "malformed",
		"awskms:///arn:aws:kms:eu-west-2:111122223333:alias/a%20b":           "alias",
		"awskms:///arn:aws:kms:eu-west-2:1111:key/" + arn[len(arn)-36:]:      "ARN",
		"awskms:///mrk-0123456789abcdef0123456789abcdef?region=eu-west-2":    "multi-region",
		"awskms:///arn:aws:kms:cn-north-1:111122223333:" + arn[len(arn)-40:]: "partition",
	} {
		o, err := awskms.ParseURL(setting)
		if err == nil {
			t.Errorf("%q was accepted as %+v", setting, o)
			continue
		}
		if !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want it to name %q", setting, err, why)
		}
	}
}

func ExampleParseURL() {
	o, err := awskms.ParseURL("awskms:///alias/coffer-eu?region=eu-central-1")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(o.Key, o.Region)
	_, err = awskms.ParseURL("awskms:///arn:aws:kms:us-east-1:111122223333:alias/coffer?region=eu-central-1")
	fmt.Println(err)
	// Output:
	// alias/coffer-eu eu-central-1
	// awskms open arn:aws:kms:us-east-1:111122223333:alias/coffer: kms: wrapped key does not match its context: the key is in another region
}
