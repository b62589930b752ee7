// Package listen receives webhooks for developers: it answers the verification
// of an endpoint, verifies signatures, opens sealed bodies and says what came.
//
// It keeps nothing: what was printed and then lost has to be asked for again. A
// request is answered after it was handed on, so one that a consumer of the
// output did not get is sent again.
package listen
