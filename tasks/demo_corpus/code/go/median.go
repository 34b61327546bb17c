package main

import (
	"errors"
	"fmt"
	"sort"
)

func median(values []float64) (float64, error) {
	n := len(values)
	if n == 0 {
		return 0, errors.New("no values given")
	}
	// Sort a copy and leave the caller's slice as it was.
	sorted := append([]float64(nil), values...)
	sort.Float64s(sorted)
	if n%2 == 1 {
		return sorted[n/2], nil
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2, nil
}

func main() {
	m, err := median([]float64{7.5, 1.2, 3.3, 9.8})
	if err != nil {
		fmt.Println("error:", err)
		return
	}
	fmt.Println(m)
}
