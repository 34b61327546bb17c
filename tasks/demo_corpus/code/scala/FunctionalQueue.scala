/** An immutable queue made of two lists. */
final class FunctionalQueue[+A] private (front: List[A], back: List[A]) {
  def isEmpty: Boolean = front.isEmpty && back.isEmpty

  def enqueue[B >: A](item: B): FunctionalQueue[B] =
    new FunctionalQueue(front, item :: back)

  def dequeue: Option[(A, FunctionalQueue[A])] = front match {
    case head :: tail => Some((head, new FunctionalQueue(tail, back)))
    case Nil if back.isEmpty => None
    case Nil => new FunctionalQueue(back.reverse, Nil).dequeue
  }
}

object FunctionalQueue {
  def empty[A]: FunctionalQueue[A] = new FunctionalQueue[A](Nil, Nil)
}
