package main

import (
	"fmt"
	"sync"
)

func square(in <-chan int, out chan<- int, wg *sync.WaitGroup) {
	defer wg.Done()
	for n := range in {
		out <- n * n
	}
}

func main() {
	in, out := make(chan int), make(chan int)
	var wg sync.WaitGroup
	for i := 0; i < 3; i++ {
		wg.Add(1)
		go square(in, out, &wg)
	}
	go func() {
		for n := 1; n <= 10; n++ {
			in <- n
		}
		close(in)
		wg.Wait()
		close(out)
	}()
	sum := 0
	for s := range out {
		sum += s
	}
	fmt.Println("sum of squares:", sum)
}
