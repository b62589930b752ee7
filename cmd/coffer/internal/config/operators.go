package config

import (
	"fmt"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
)

// OperatorOfToken is the name of the operator whose token is in
// operator_token_file.
const OperatorOfToken = "token"

// operators reads the operators of both settings.
func (f File) operators() (auth.Operators, error) {
	var all auth.Operators
	if f.OperatorTokenFile == "" && f.OperatorsFile == "" {
		return all, fmt.Errorf("%w: operator_token_file and operators_file are missing", ErrInvalid)
	}
	if f.OperatorTokenFile != "" {
		operator, err := auth.LoadOperator(f.OperatorTokenFile)
		if err == nil {
			err = all.Add(OperatorOfToken, operator)
		}
		if err != nil {
			return all, fmt.Errorf("%w: operator_token_file: %w", ErrInvalid, err)
		}
	}
	if f.OperatorsFile != "" {
		if err := all.Load(f.OperatorsFile); err != nil {
			return all, fmt.Errorf("%w: operators_file: %w", ErrInvalid, err)
		}
	}
	return all, nil
}
