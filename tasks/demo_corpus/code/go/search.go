package main

import "fmt"

// search returns the index of target in a sorted slice, or -1.
func search(sorted []int, target int) int {
	low, high := 0, len(sorted)
	for low < high {
		mid := low + (high-low)/2
		if sorted[mid] < target {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low < len(sorted) && sorted[low] == target {
		return low
	}
	return -1
}

func main() {
	years := []int{1912, 1936, 1958, 1977, 2004}
	fmt.Println(search(years, 1958), search(years, 1960))
}
