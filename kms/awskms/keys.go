package awskms

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/retry"
)

// maxCiphertext is the longest ciphertext that KMS takes.
const maxCiphertext = 6144

// encryptionContext is the binding context in KMS's form. Its parts are never
// empty, and opaque, for it shows in CloudTrail.
func encryptionContext(c kms.Context) map[string]string {
	return map[string]string{"coffer-region": c.Region, "coffer-app": c.App, "coffer-purpose": c.Purpose}
}

// Generate has KMS make a key and wrap it.
func (p *Provider) Generate(ctx context.Context, binding kms.Context) ([]byte, kms.Wrap, error) {
	const op = "generate"
	if err := binding.Validate(); err != nil {
		return nil, kms.Wrap{}, fmt.Errorf("awskms: %s: %w", op, err)
	}
	arn, err := p.key(ctx)
	if err != nil {
		return nil, kms.Wrap{}, err
	}
	var out *service.GenerateDataKeyOutput
	err = p.call(ctx, op, 1, false, func(ctx context.Context) (a answer, err error) {
		out, err = p.client.GenerateDataKey(ctx, &service.GenerateDataKeyInput{
			KeyId: aws.String(arn), KeySpec: types.DataKeySpecAes256, EncryptionContext: encryptionContext(binding),
		})
		if err != nil {
			return a, err
		}
		return answer{out.ResultMetadata}, nil
	})
	if err != nil {
		return nil, kms.Wrap{}, err
	}
	w, err := p.wrapped(op, arn, out.KeyId, out.KeyMaterialId, out.CiphertextBlob)
	if err == nil && len(out.Plaintext) != kms.KeySize {
		err = p.fail(op, kms.ErrUnavailable, "the answer holds no key of 256 bits")
	}
	if err != nil {
		clear(out.Plaintext)
		return nil, kms.Wrap{}, err
	}
	return out.Plaintext, w, nil
}

// Wrap encrypts key.
func (p *Provider) Wrap(ctx context.Context, binding kms.Context, key []byte) (kms.Wrap, error) {
	const op = "wrap"
	if err := binding.Validate(); err != nil {
		return kms.Wrap{}, fmt.Errorf("awskms: %s: %w", op, err)
	}
	if len(key) != kms.KeySize {
		return kms.Wrap{}, fmt.Errorf("awskms: %s: %w: the key has not 32 bytes", op, kms.ErrInput)
	}
	arn, err := p.key(ctx)
	if err != nil {
		return kms.Wrap{}, err
	}
	var out *service.EncryptOutput
	err = p.call(ctx, op, 1, false, func(ctx context.Context) (a answer, err error) {
		out, err = p.client.Encrypt(ctx, &service.EncryptInput{
			KeyId: aws.String(arn), Plaintext: key, EncryptionContext: encryptionContext(binding),
		})
		if err != nil {
			return a, err
		}
		return answer{out.ResultMetadata}, nil
	})
	if err != nil {
		return kms.Wrap{}, err
	}
	return p.wrapped(op, arn, out.KeyId, nil, out.CiphertextBlob)
}

// Unwrap decrypts the key in w. KMS is told which key has to have wrapped it.
func (p *Provider) Unwrap(ctx context.Context, binding kms.Context, w kms.Wrap) ([]byte, error) {
	const op = "unwrap"
	if err := binding.Validate(); err != nil {
		return nil, fmt.Errorf("awskms: %s: %w", op, err)
	}
	arn, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.own(op, arn, w); err != nil {
		return nil, err
	}
	var out *service.DecryptOutput
	err = p.call(ctx, op, 1, false, func(ctx context.Context) (a answer, err error) {
		out, err = p.client.Decrypt(ctx, &service.DecryptInput{
			KeyId: aws.String(arn), CiphertextBlob: w.Blob, EncryptionContext: encryptionContext(binding),
		})
		if err != nil {
			return a, err
		}
		return answer{out.ResultMetadata}, nil
	})
	switch {
	case err != nil:
		return nil, err
	case out.KeyId == nil || out.Plaintext == nil:
		clear(out.Plaintext)
		return nil, p.fail(op, kms.ErrUnavailable, "the answer holds no key")
	case *out.KeyId != arn:
		clear(out.Plaintext)
		return nil, p.fail(op, kms.ErrMismatch, "another key decrypted it")
	case len(out.Plaintext) != kms.KeySize:
		clear(out.Plaintext)
		return nil, p.fail(op, kms.ErrMismatch, "the blob holds no key of 256 bits")
	}
	return out.Plaintext, nil
}

// Rewrap has KMS re-encrypt each key, several at a time. When something fails
// that is not the fault of one item, no more requests are begun, and what was
// not done has that error.
func (p *Provider) Rewrap(ctx context.Context, items []kms.RewrapItem) ([]kms.RewrapResult, error) {
	results := make([]kms.RewrapResult, len(items))
	if len(items) == 0 {
		return results, nil
	}
	arn, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	var (
		next    atomic.Int64
		done    atomic.Int64
		stopped atomic.Pointer[error]
		group   sync.WaitGroup
	)
	for range min(p.concurrency, len(items)) {
		group.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(items)); i = next.Add(1) - 1 {
				if err := stopped.Load(); err != nil {
					results[i].Err = *err
					continue
				}
				results[i].Wrap, results[i].Err = p.rewrap(ctx, arn, items[i])
				switch err := results[i].Err; {
				case err == nil:
					done.Add(1)
				case !errors.Is(err, kms.ErrMismatch) && !errors.Is(err, kms.ErrInput):
					stopped.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	group.Wait()
	if err := stopped.Load(); err != nil && done.Load() == 0 {
		return nil, *err
	}
	return results, nil
}

func (p *Provider) rewrap(ctx context.Context, arn string, item kms.RewrapItem) (kms.Wrap, error) {
	const op = "rewrap"
	if err := item.Context.Validate(); err != nil {
		return kms.Wrap{}, fmt.Errorf("awskms: %s: %w", op, err)
	}
	if err := p.own(op, arn, item.Wrap); err != nil {
		return kms.Wrap{}, err
	}
	var out *service.ReEncryptOutput
	err := p.call(ctx, op, 1, false, func(ctx context.Context) (a answer, err error) {
		binding := encryptionContext(item.Context)
		out, err = p.client.ReEncrypt(ctx, &service.ReEncryptInput{
			CiphertextBlob: item.Wrap.Blob,
			SourceKeyId:    aws.String(arn), SourceEncryptionContext: binding,
			DestinationKeyId: aws.String(arn), DestinationEncryptionContext: binding,
		})
		if err != nil {
			return a, err
		}
		return answer{out.ResultMetadata}, nil
	})
	if err != nil {
		return kms.Wrap{}, err
	}
	// The id of a key where KMS gives no ARN: the emulators do, for the source.
	if source := aws.ToString(out.SourceKeyId); source != "" && source != arn && !strings.HasSuffix(arn, "/"+source) {
		return kms.Wrap{}, p.fail(op, kms.ErrMismatch, "another key decrypted it")
	}
	return p.wrapped(op, arn, out.KeyId, out.DestinationKeyMaterialId, out.CiphertextBlob)
}

// wrapped checks an answer and describes it.
func (p *Provider) wrapped(op, arn string, key, material *string, blob []byte) (kms.Wrap, error) {
	switch {
	case key == nil || len(blob) == 0 || len(blob) > maxCiphertext:
		return kms.Wrap{}, p.fail(op, kms.ErrUnavailable, "the answer holds no ciphertext")
	case *key != arn:
		return kms.Wrap{}, p.fail(op, kms.ErrMismatch, "another key encrypted it")
	}
	return kms.Wrap{Provider: Name, Key: arn, Version: p.heard(material), Blob: blob, WrappedAt: time.Now().UTC()}, nil
}

// own refuses what this key cannot have wrapped, without asking KMS.
func (p *Provider) own(op, arn string, w kms.Wrap) error {
	switch {
	case w.Provider != Name || w.Key != arn:
		return p.fail(op, kms.ErrMismatch, "wrapped by another key")
	case len(w.Blob) == 0 || len(w.Blob) > maxCiphertext:
		return p.fail(op, kms.ErrMismatch, "the blob is no ciphertext of KMS")
	default:
		return nil
	}
}

// answer is what every answer of the SDK has.
type answer struct{ metadata middleware.Metadata }

// call makes a request, repeats it as the retry policy says, and takes new
// credentials when those it has are not accepted. once: it is not to be repeated
// when the outcome is unknown.
func (p *Provider) call(ctx context.Context, op string, items int, once bool, do func(context.Context) (answer, error)) error {
	policy := p.retry
	if once {
		policy.Attempts = 1
	}
	return policy.Do(ctx, func(attempt context.Context) error {
		used, err := p.credentials.Retrieve(attempt)
		if err != nil {
			return p.noCredentials(ctx, op, err)
		}
		err = p.send(ctx, attempt, op, items, do)
		if !errors.Is(err, kms.ErrUnauthenticated) || !p.renew(attempt, used) {
			return err
		}
		return p.send(ctx, attempt, op, items, do)
	})
}

// renew takes credentials from their source once more, and reports whether they
// are others than those used.
func (p *Provider) renew(ctx context.Context, used aws.Credentials) bool {
	same := func(c aws.Credentials) bool {
		return c.AccessKeyID == used.AccessKeyID && c.SecretAccessKey == used.SecretAccessKey && c.SessionToken == used.SessionToken
	}
	c, err := p.credentials.Retrieve(ctx)
	if err == nil && same(c) {
		p.credentials.Invalidate()
		c, err = p.credentials.Retrieve(ctx)
	}
	return err == nil && !same(c)
}

// noCredentials tells a source that does not answer from one that has none.
func (p *Provider) noCredentials(ctx context.Context, op string, err error) error {
	fail := p.fail(op, kms.ErrUnauthenticated, "no credentials in the SDK's default chain")
	var network net.Error
	api, answered := errors.AsType[smithy.APIError](err)
	switch {
	case ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded):
		fail.Class, fail.Detail = kms.ErrUnavailable, "no credentials in time"
	case answered && api.ErrorFault() == smithy.FaultServer:
		fail.Class, fail.Detail = kms.ErrUnavailable, "the source of credentials is out of order"
	case answered:
		fail.Detail = "the source of credentials refuses: " + codeName(api.ErrorCode())
	case errors.As(err, &network):
		fail.Class, fail.Detail = kms.ErrUnavailable, "the source of credentials does not answer"
	}
	return retry.Caused(ctx, fail)
}

// send makes one request under the context of the attempt; ctx is the caller's.
func (p *Provider) send(ctx, attempt context.Context, op string, items int, do func(context.Context) (answer, error)) error {
	start := time.Now()
	out, err := do(attempt)
	id, _ := awsmiddleware.GetRequestIDMetadata(out.metadata)
	if err != nil {
		if failed, ok := errors.AsType[*awshttp.ResponseError](err); ok {
			id = failed.ServiceRequestID()
		}
		v := classify(err)
		if v.state && op != "describe" {
			v.class = p.stateOf(ctx, attempt, v.class)
		}
		fail := p.fail(op, v.class, v.detail)
		fail.RequestID = retry.RequestID(id)
		err = retry.Caused(ctx, fail)
	}
	p.observe(ctx, kms.Call{
		Provider: Name, Key: p.fail(op, nil, "").Key, Operation: op, RequestID: retry.RequestID(id),
		Items: items, Duration: time.Since(start), Err: err,
	})
	return err
}

// stateOf is the class of the key's present state, as far as it can be had.
func (p *Provider) stateOf(ctx, attempt context.Context, otherwise error) error {
	arn := p.arn.Load()
	if arn == nil {
		return otherwise
	}
	var out *service.DescribeKeyOutput
	err := p.send(ctx, attempt, "describe", 0, func(ctx context.Context) (a answer, err error) {
		if out, err = p.client.DescribeKey(ctx, &service.DescribeKeyInput{KeyId: arn}); err != nil {
			return a, err
		}
		return answer{out.ResultMetadata}, nil
	})
	if err != nil || out.KeyMetadata == nil {
		return otherwise
	}
	switch out.KeyMetadata.KeyState {
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		return kms.ErrPendingDeletion
	case types.KeyStateUnavailable, types.KeyStateCreating, types.KeyStateUpdating:
		return kms.ErrUnavailable
	default:
		return kms.ErrDisabled
	}
}
