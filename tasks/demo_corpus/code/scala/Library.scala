import scala.collection.mutable

case class Book(title: String, author: String, year: Int)

class Library {
  private val books = mutable.ArrayBuffer.empty[Book]

  def +=(book: Book): this.type = {
    books += book
    this
  }

  def by(author: String): Seq[Book] =
    books.filter(_.author == author).sortBy(_.year).toSeq

  def decades: Map[Int, Int] =
    books.toSeq.groupBy(_.year / 10 * 10).map { case (decade, list) => decade -> list.size }
}

object LibraryDemo extends App {
  val library = new Library
  library += Book("Salt Roads", "P. Lind", 1994)
  println(library.decades)
}
