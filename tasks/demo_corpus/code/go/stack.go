package stack

import "errors"

// ErrEmpty is returned when there is nothing left to pop.
var ErrEmpty = errors.New("stack is empty")

// Stack holds values of any one type.
type Stack[T any] struct {
	items []T
}

func (s *Stack[T]) Push(item T) {
	s.items = append(s.items, item)
}

func (s *Stack[T]) Pop() (T, error) {
	var zero T
	if len(s.items) == 0 {
		return zero, ErrEmpty
	}
	last := len(s.items) - 1
	item := s.items[last]
	s.items[last] = zero
	s.items = s.items[:last]
	return item, nil
}

func (s *Stack[T]) Len() int {
	return len(s.items)
}
