// Package awskms wraps keys with a symmetric key of AWS KMS. The key encryption
// key never leaves the service.
//
// # The key
//
// It is named by its ARN, its id, or an alias. What is stored with a wrapped key
// is the ARN: an alias is looked up once and then no longer followed, so that
// moving it to another key changes nothing behind the back of a running process.
// Residency is checked before the first use and in every answer: the ARN must be
// of the region (and so of the partition, aws-cn for China), and the key must
// not be a multi-region key, whose material leaves the region.
//
// The binding context is KMS's encryption context, with the entries
// coffer-region, coffer-app and coffer-purpose. It shows in CloudTrail.
//
// # Versions
//
// The version of a wrap is the id of the key material. KMS tells it when it
// generates, rewraps and describes, not when it encrypts: there it is the one
// last heard of, which a rotation made elsewhere may have replaced. Where KMS
// tells none, the version is "1".
//
// Old material of a key decrypts for ever, so Retire refuses and says what ends
// a key: wrap everything with another key, then disable this one with Disable.
//
// # Promises
//
// Requests end with the caller's context. The SDK retries nothing; this package
// repeats what was throttled or unavailable, a few times and within the
// deadline. When KMS does not accept the credentials, new ones are taken from
// where they come from, once. Errors carry a class of the closed set of package
// kms, and their text holds nothing that AWS wrote but names of error codes.
//
// # Sources
//
// https://docs.aws.amazon.com/kms/latest/APIReference and the developer guide's
// pages on encryption context, key states, quotas and rotation.
package awskms

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go/logging"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/bounded"
	"github.com/cofferdb/coffer/kms/internal/retry"
)

// Name is the name of this provider in kms.Wrap.
const Name = "awskms"

// maxAnswer is a hundred times what KMS answers.
const maxAnswer = 256 << 10

// unknownVersion stands where KMS tells no key material.
const unknownVersion = "1"

// Options are what a Provider needs to know. Key and Region are required; the
// region of an ARN need not be repeated.
type Options struct {
	// Key is the ARN of a key or of an alias, the id of a key, or alias/NAME.
	Key string
	// Region must be that of the key.
	Region string
	// Endpoint is a URL instead of the region's own endpoint; http is allowed for
	// loopback addresses. The SDK's AWS_ENDPOINT_URL_KMS is heard otherwise.
	Endpoint string
	// Profile of the shared configuration files. Empty: AWS_PROFILE or "default".
	Profile string
	// Credentials instead of the SDK's default chain (environment, shared files,
	// web identity, container, instance).
	Credentials aws.CredentialsProvider
	// Timeout and Attempts bound the requests of one call; zero is five seconds
	// for one request, and four requests.
	Timeout  time.Duration
	Attempts int
	// Concurrency is how many requests Rewrap makes at a time; zero is 16. KMS
	// has no batches.
	Concurrency int
	Log         *slog.Logger // nil logs nothing
	// Observe is called after every request to KMS.
	Observe func(context.Context, kms.Call)
}

// Provider implements kms.Provider, kms.Rotator and kms.Retirer.
type Provider struct {
	name        string // as configured
	place       place
	client      *service.Client
	credentials *aws.CredentialsCache
	retry       retry.Policy
	concurrency int
	observe     func(context.Context, kms.Call)
	log         *slog.Logger
	http        *bounded.Transport

	arn     atomic.Pointer[string] // of the key, once it was seen to be the right kind
	version atomic.Pointer[string] // key material last heard of
}

var (
	_ kms.Provider = (*Provider)(nil)
	_ kms.Rotator  = (*Provider)(nil)
	_ kms.Retirer  = (*Provider)(nil)
)

// New returns a provider. It reads the SDK's configuration and sends nothing to
// KMS: Describe tells whether the key is there. A key of another region or
// partition, and a multi-region key, are *kms.Error of class ErrMismatch.
func New(ctx context.Context, o Options) (*Provider, error) {
	where, err := o.check()
	if err != nil {
		return nil, err
	}
	load := []func(*config.LoadOptions) error{
		config.WithRegion(where.region),
		config.WithLogger(logging.Nop{}), // it would write to standard error
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
	}
	if o.Profile != "" {
		load = append(load, config.WithSharedConfigProfile(o.Profile))
	}
	if o.Credentials != nil {
		load = append(load, config.WithCredentialsProvider(o.Credentials))
	}
	conf, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		// The SDK's text may quote the files.
		return nil, invalid("the SDK's configuration cannot be read")
	}
	cache, ok := conf.Credentials.(*aws.CredentialsCache)
	if !ok {
		cache = aws.NewCredentialsCache(conf.Credentials)
	}
	conf.Credentials = cache
	transport := bounded.New(&tls.Config{MinVersion: tls.VersionTLS12}, maxAnswer)
	p := &Provider{
		name:        o.Key,
		place:       where,
		credentials: cache,
		retry:       retry.Policy{Attempts: o.Attempts, Timeout: o.Timeout},
		concurrency: o.Concurrency,
		observe:     o.Observe,
		log:         o.Log,
		http:        transport,
		client: service.NewFromConfig(conf, func(s *service.Options) {
			s.HTTPClient = transport.Client()
			s.Retryer = aws.NopRetryer{}
			if o.Endpoint != "" {
				s.BaseEndpoint = aws.String(o.Endpoint)
			}
		}),
	}
	if p.concurrency == 0 {
		p.concurrency = 16
	}
	if p.observe == nil {
		p.observe = func(context.Context, kms.Call) {}
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	return p, nil
}

// Close ends requests under way.
func (p *Provider) Close() error {
	p.http.Close()
	return nil
}

// Describe asks for the key.
func (p *Provider) Describe(ctx context.Context) (kms.Description, error) {
	k, err := p.read(ctx, "describe")
	if err != nil {
		return kms.Description{}, err
	}
	d := kms.Description{
		Provider: Name, Key: aws.ToString(k.Arn), Version: p.heard(k.CurrentKeyMaterialId),
		Region: p.place.region, NativeRewrap: true,
	}
	switch k.KeyState {
	case types.KeyStateEnabled, types.KeyStateCreating, types.KeyStateUpdating:
		d.State = kms.StateEnabled
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		d.State = kms.StatePendingDeletion
	default: // disabled, without material, in a key store that is not connected
		d.State = kms.StateDisabled
	}
	return d, nil
}

// key returns the ARN of the key, after checking once that the key may be used.
func (p *Provider) key(ctx context.Context) (string, error) {
	if arn := p.arn.Load(); arn != nil {
		return *arn, nil
	}
	k, err := p.read(ctx, "describe")
	if err != nil {
		return "", err
	}
	return aws.ToString(k.Arn), nil
}

// read describes the key and refuses one of another place or kind.
func (p *Provider) read(ctx context.Context, op string) (*types.KeyMetadata, error) {
	id := p.name
	if arn := p.arn.Load(); arn != nil {
		id = *arn
	}
	var k *types.KeyMetadata
	err := p.call(ctx, op, 0, false, func(ctx context.Context) (answer, error) {
		out, err := p.client.DescribeKey(ctx, &service.DescribeKeyInput{KeyId: aws.String(id)})
		if err != nil {
			return answer{}, err
		}
		k = out.KeyMetadata
		return answer{out.ResultMetadata}, nil
	})
	if err != nil {
		return nil, err
	}
	if k == nil || aws.ToString(k.Arn) == "" {
		return nil, p.fail(op, kms.ErrUnavailable, "the answer describes no key")
	}
	arn := aws.ToString(k.Arn)
	if wrong := p.place.refuse(arn); wrong != "" || aws.ToBool(k.MultiRegion) {
		if wrong == "" {
			wrong = "a multi-region key"
		}
		return nil, p.fail(op, kms.ErrMismatch, wrong)
	}
	if pinned := p.arn.Load(); pinned != nil && *pinned != arn {
		return nil, p.fail(op, kms.ErrMismatch, "the answer describes another key")
	}
	if k.KeyUsage != types.KeyUsageTypeEncryptDecrypt || k.KeySpec != "" && k.KeySpec != types.KeySpecSymmetricDefault {
		return nil, p.fail(op, kms.ErrNotFound, "not a symmetric key for encryption")
	}
	p.arn.CompareAndSwap(nil, &arn)
	return k, nil
}

// heard returns the version of some key material, and remembers it.
func (p *Provider) heard(material *string) string {
	if v := aws.ToString(material); v != "" && len(v) <= 128 {
		p.version.Store(&v)
		return v
	}
	if v := p.version.Load(); v != nil {
		return *v
	}
	return unknownVersion
}

// Rotate makes new key material on demand, of which KMS allows 25 in the life of
// a key, and returns its id when KMS uses it. When the answer is lost the
// material may or may not have been made: Describe tells.
func (p *Provider) Rotate(ctx context.Context) (string, error) {
	const op = "rotate"
	before, err := p.read(ctx, op)
	if err != nil {
		return "", err
	}
	// Once: a repeated rotation would use up another of the 25.
	err = p.call(ctx, op, 0, true, func(ctx context.Context) (answer, error) {
		out, err := p.client.RotateKeyOnDemand(ctx, &service.RotateKeyOnDemandInput{KeyId: before.Arn})
		if err != nil {
			return answer{}, err
		}
		return answer{out.ResultMetadata}, nil
	})
	if err != nil {
		return "", err
	}
	if before.CurrentKeyMaterialId == nil {
		return unknownVersion, nil
	}
	// KMS rotates in the background.
	var after *types.KeyMetadata
	err = p.confirm(ctx, op, func(k *types.KeyMetadata) bool {
		after = k
		return aws.ToString(k.CurrentKeyMaterialId) != aws.ToString(before.CurrentKeyMaterialId)
	})
	if err != nil {
		return "", err
	}
	return p.heard(after.CurrentKeyMaterialId), nil
}

// Retire returns an error that wraps kms.ErrInput, for AWS keeps all material of
// a key able to decrypt. What ends it: make another key, migrate to it, and
// Disable this one.
func (p *Provider) Retire(context.Context, string) error {
	return fmt.Errorf("awskms: retire: %w: AWS KMS keeps old key material able to decrypt; "+
		"migrate to another key and disable this one", kms.ErrInput)
}

// Disable makes the key unable to wrap and unwrap, and returns once KMS confirms
// it. It is what retiring is to AWS: check first that nothing is wrapped by the
// key. It can be undone in the console, and deleting the key there cannot.
func (p *Provider) Disable(ctx context.Context) error {
	const op = "retire"
	k, err := p.read(ctx, op)
	if err != nil {
		return err
	}
	if k.KeyState == types.KeyStateEnabled {
		err := p.call(ctx, op, 0, false, func(ctx context.Context) (answer, error) {
			out, err := p.client.DisableKey(ctx, &service.DisableKeyInput{KeyId: k.Arn})
			if err != nil {
				return answer{}, err
			}
			return answer{out.ResultMetadata}, nil
		})
		if err != nil {
			return err
		}
	}
	return p.confirm(ctx, op, func(k *types.KeyMetadata) bool {
		return k.KeyState == types.KeyStateDisabled || k.KeyState == types.KeyStatePendingDeletion
	})
}

// confirm describes the key until done, for as long as ctx and the retry policy
// allow: KMS is eventually consistent.
func (p *Provider) confirm(ctx context.Context, op string, done func(*types.KeyMetadata) bool) error {
	return p.retry.Do(ctx, func(ctx context.Context) error {
		k, err := p.read(ctx, op)
		if err != nil {
			return err
		}
		if !done(k) {
			return p.fail(op, kms.ErrUnavailable, "KMS does not confirm the change yet")
		}
		return nil
	})
}

func (p *Provider) fail(op string, class error, detail string) *kms.Error {
	key := p.name
	if arn := p.arn.Load(); arn != nil {
		key = *arn
	}
	return &kms.Error{Op: op, Provider: Name, Key: key, Class: class, Detail: detail}
}
