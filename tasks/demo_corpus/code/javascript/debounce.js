'use strict';

/**
 * Delay a call until no new call has come in for `wait` milliseconds.
 */
function debounce(fn, wait) {
  let timer = null;

  function debounced(...args) {
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = null;
      fn.apply(this, args);
    }, wait);
  }

  debounced.cancel = () => clearTimeout(timer);
  return debounced;
}

const save = debounce((text) => console.log('saved', text), 50);
save('h');
save('he');
save('hello');
